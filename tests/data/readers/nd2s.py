"""Writes ND2 3.0 files for tests: what nd2 needs of them, laid out as files of NIS-Elements are."""

import pathlib
import struct

import numpy as np

_MAGIC, _NAME = 0x0ABECEDA, 4072  # of a chunk; bytes for its name
_SPECTRUM = {'uiCount': 1, 'pPoint': {'Point0': {'eType': 2, 'dWavelength': 488.0, 'dTValue': 1.0}}}


def _lite(values: dict) -> bytes:
  """A 'CLX lite' variant: type, length of the name, the name in UTF-16, the value."""
  out = b''
  for name, value in values.items():
    head = lambda kind, name=name: struct.pack('BB', kind, len(name) + 1) + f'{name}\0'.encode('utf-16-le')
    if isinstance(value, dict):
      inner = _lite(value)
      size = len(head(11)) + 12 + len(inner)
      out += head(11) + struct.pack('<IQ', len(value), size) + inner + bytes(8 * len(value))
    elif isinstance(value, bool):
      out += head(1) + struct.pack('B', value)
    elif isinstance(value, int):
      out += head(3) + struct.pack('<I', value)
    elif isinstance(value, float):
      out += head(6) + struct.pack('<d', value)
    else:
      out += head(8) + f'{value}\0'.encode('utf-16-le')
  return out


def write(path: pathlib.Path, frames: np.ndarray, names, um: float, z_step: float | None = None, colour: bool = False,
          lost: int = -1) -> pathlib.Path:
  """Writes frames [n, H, W, C], the planes of a stack where `z_step` (um) is given; frame `lost` is left out."""
  n, height, width, count = frames.shape
  bits = 8 * frames.itemsize
  probe = {'m_ExcitationSpectrum': _SPECTRUM, 'm_EmissionSpectrum': _SPECTRUM}
  planes = {f'a{i}': {'uiCompCount': 3 if colour else 1, 'uiSampleIndex': i, 'sDescription': name, 'uiColor': 0xFFFFFF,
                      'pFluorescentProbe': probe} for i, name in enumerate(names)}
  chunks = {
    'ImageAttributesLV!': _lite({'SLxImageAttributes': {
      'uiWidth': width, 'uiWidthBytes': width * count * frames.itemsize, 'uiHeight': height, 'uiComp': count,
      'uiBpcInMemory': bits, 'uiBpcSignificant': bits, 'uiSequenceCount': n, 'eCompression': 2}}),
    'ImageMetadataSeqLV|0!': _lite({'SLxPictureMetadata': {
      'dCalibration': um, 'bCalibrated': True,
      'sPicturePlanes': {'uiCount': len(names), 'uiSampleCount': len(names), 'sPlaneNew': planes, 'sSampleSetting': {}}}})}
  if z_step:
    chunks['ImageMetadataLV!'] = _lite({'SLxExperiment': {'eType': 4, 'uLoopPars': {
      'uiCount': n, 'dZStep': z_step, 'dZLow': 0.0, 'dZHigh': z_step * (n - 1), 'dZHome': 0.0, 'iType': 0}}})
  for i, frame in enumerate(frames):
    if i != lost:
      chunks[f'ImageDataSeq|{i}!'] = struct.pack('<d', float(i)) + frame.tobytes()
  out = bytearray(struct.pack('<IIQ32s64s', _MAGIC, 32, 64, b'ND2 FILE SIGNATURE CHUNK NAME01!', b'Ver3.0'))
  table = b''
  for name, data in chunks.items():
    table += name.encode() + struct.pack('<QQ', _chunk(out, name, data), len(data))
  place = len(out) + -len(out) % 4096
  _chunk(out, 'ND2 FILEMAP SIGNATURE NAME 0001!', table + b'ND2 CHUNK MAP SIGNATURE 0000001!' + struct.pack('<Q', place))
  path.write_bytes(out)
  return path


def _chunk(out: bytearray, name: str, data: bytes) -> int:
  out += bytes(-len(out) % 4096)
  place = len(out)
  out += struct.pack('<IIQ', _MAGIC, _NAME, len(data)) + name.encode().ljust(_NAME, b'\0') + data
  return place
