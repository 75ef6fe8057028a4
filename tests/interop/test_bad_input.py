"""Each mistake is one line that names the file or tensor and what to do; nothing is half written."""

import errno
import json
import os
import pickle

import numpy as np
import pytest
import safetensors.numpy

from jaxmed import interop
from jaxmed.errors import UserError
from jaxmed.interop.channelvit import from_channelvit, to_channelvit
from jaxmed.interop.timm import from_timm, to_timm

from .test_roundtrip import build, to_contiguous


@pytest.fixture
def vit():
  return build('vit_micro/8', 16, {})


@pytest.fixture
def tensors(vit):
  return to_timm(*vit)


def save(path, tensors, metadata=None):
  safetensors.numpy.save_file(to_contiguous(tensors), path, metadata)
  return path


def fails(words, f, *args, **kwargs):
  with pytest.raises(UserError) as e:
    f(*args, **kwargs)
  assert '\n' not in str(e.value)
  for word in words if isinstance(words, list) else [words]:
    assert word in str(e.value), str(e.value)


def test_missing_file(tmp_path):
  fails(['x.safetensors', 'does not exist'], interop.load_file, tmp_path / 'x.safetensors')


def test_folder(tmp_path):
  fails('is a folder', interop.load_file, tmp_path)


@pytest.mark.parametrize('content', [b'', b'hello', b'\x00' * 100, b'{"a": 1}' * 9])
def test_not_safetensors(tmp_path, content):
  (tmp_path / 'x.safetensors').write_bytes(content)
  fails(['x.safetensors', 'damaged or something else'], interop.load_file, tmp_path / 'x.safetensors', 'timm')


@pytest.mark.parametrize('keep', [0.2, 0.5, 0.999])
def test_truncated(tmp_path, vit, keep):
  path = tmp_path / 'x.safetensors'
  interop.export_file(path, 'timm', *vit, {})
  path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
  fails(['x.safetensors', 'damaged'], interop.load_file, path)


@pytest.mark.parametrize(
  'name,content',
  [('w.pth', b'PK\x03\x04rest'), ('w.pt', pickle.dumps({'a': 1})), ('w.safetensors', b'PK\x03\x04rest')],
)
def test_torch_pickle(tmp_path, name, content):
  (tmp_path / name).write_bytes(content)
  fails([name, 'PyTorch checkpoint'], interop.load_file, tmp_path / name, 'timm')


def test_a_pickle_that_runs_code(tmp_path):
  class Evil:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / 'ran'),)

  (tmp_path / 'w.bin').write_bytes(pickle.dumps({'a': Evil()}))
  fails(['w.bin', 'posix.mkdir', 'could run code'], interop.load_file, tmp_path / 'w.bin', 'timm')
  assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_weights_that_are_not_numbers(tmp_path, vit, tensors, value):
  tensors['blocks.1.attn.proj.bias'] = tensors['blocks.1.attn.proj.bias'].copy()
  tensors['blocks.1.attn.proj.bias'][3] = value
  path = save(tmp_path / 'x.safetensors', tensors)
  fails(["'blocks.1.attn.proj.bias'", '1 NaN or infinite of 128'], interop.load_file, path, 'timm')
  model, params = vit
  params['norm']['scale'][0] = value
  out = tmp_path / 'out.safetensors'
  fails("'norm.weight'", interop.export_file, out, 'timm', model, params, {})
  assert not out.exists()


def test_foreign_file_without_format(tmp_path, tensors):
  path = save(tmp_path / 'x.safetensors', tensors)
  fails(['x.safetensors', 'pass --format timm', 'channelvit, jaxmed, monai_swinunetr'], interop.load_file, path)
  path = save(tmp_path / 'y.safetensors', to_channelvit(*build('channel_vit_micro/8', 16, {})))
  fails('pass --format channelvit', interop.load_file, path)
  path = save(tmp_path / 'z.safetensors', {'conv1.weight': np.ones((3, 3))})
  fails(['pass --format;', 'channelvit, jaxmed, monai_swinunetr'], interop.load_file, path)


def test_wrong_format_for_the_tensors(tmp_path, tensors):
  path = save(tmp_path / 'x.safetensors', tensors)
  fails(['x.safetensors', 'look like --format timm'], interop.load_file, path, 'channelvit')
  fails('has no jaxmed metadata', interop.load_file, path, 'jaxmed')


def test_unknown_format(tmp_path, vit, tensors):
  fails("did you mean 'timm'", interop.export_file, tmp_path / 'x', 'tim', *vit, {})
  fails("did you mean 'channelvit'", interop.load_file, save(tmp_path / 'x', tensors), 'channel_vit')


def test_options_that_contradict_the_file(tmp_path, vit):
  path = tmp_path / 'x.safetensors'
  interop.export_file(path, 'timm', *vit, {})
  fails(['--format timm', 'not channelvit'], interop.load_file, path, 'channelvit')
  fails(['--num-heads 4', 'not 2'], interop.load_file, path, None, 2)
  fails(['--image-size (16, 16)', 'not (32, 32)'], interop.load_file, path, None, None, (32, 32))
  assert interop.load_file(path, 'timm', 4, (16, 16))[0] == vit[0]


@pytest.mark.parametrize(
  'change',
  [
    lambda m: '{',
    lambda m: '[]',
    lambda m: json.dumps(m | {'format': 'other'}),
    lambda m: json.dumps({'format': 'timm'}),
    lambda m: json.dumps(m | {'model': m['model'] | {'family': 'cnn'}}),
    lambda m: json.dumps(m | {'model': m['model'] | {'new_field': 1}}),
    lambda m: json.dumps(m | {'model': m['model'] | {'depth': 3}}),
    lambda m: json.dumps(m | {'model': m['model'] | {'in_channels': 3}}),
  ],
)
def test_damaged_metadata(tmp_path, vit, change):
  path = tmp_path / 'x.safetensors'
  interop.export_file(path, 'timm', *vit, {})
  with safetensors.safe_open(path, framework='numpy') as f:
    meta = json.loads(f.metadata()['jaxmed'])
  save(path, safetensors.numpy.load_file(path), {'jaxmed': change(meta)})
  fails('x.safetensors', interop.load_file, path)


@pytest.mark.parametrize(
  'name',
  [
    'pos_embed',
    'norm.bias',
    'blocks.0.norm1.weight',
    'blocks.1.mlp.fc2.bias',
    'patch_embed.proj.weight',
    'patch_embed.proj.bias',
    'blocks.1.attn.qkv.weight',
  ],
)
def test_missing_tensor(tensors, name):
  del tensors[name]
  words = {'pos_embed': 'pass --image-size'}.get(name, f'{name!r} is missing')
  fails(words, from_timm, tensors)


@pytest.mark.parametrize(
  'name', ['norm.weight', 'blocks.1.mlp.fc2.weight', 'cls_token', 'blocks.0.attn.qkv.bias']
)
def test_wrong_shape(tensors, name):
  tensors[name] = np.zeros((3, 5), np.float32)
  fails([f'{name!r} has shape [3, 5]', 'expected'], from_timm, tensors)


@pytest.mark.parametrize(
  'name',
  [
    'blocks.0.attn.q_norm.weight',
    'fc_norm.weight',
    'attn_pool.pos_embed',
    'blocks.2.attn.qkv.weight',
    'rope.freqs',
  ],
)
def test_tensor_without_a_place(tensors, name):
  tensors[name] = np.zeros(3, np.float32)
  fails([repr(name), 'no place'], from_timm, tensors)


def test_blocks_that_differ(tensors):
  del tensors['blocks.1.attn.qkv.bias']
  fails('blocks.1 has other tensors', from_timm, tensors)


def test_hidden_widths_that_do_not_meet(tensors):
  tensors['blocks.0.mlp.fc1.weight'] = np.zeros((300, 128), np.float32)
  tensors['blocks.0.mlp.fc1.bias'] = np.zeros(300, np.float32)
  fails(['blocks.0.mlp.fc1', '300', '512'], from_timm, tensors)


def test_heads_and_sizes(tensors):
  fails(['num_heads 5', 'nearest is 4'], from_timm, tensors, 5)
  fails(['4 patch positions', '(32, 32)'], from_timm, tensors, 2, (32, 32))
  fails(['4 patch positions'], from_timm, tensors, 2, (17, 17))
  tensors['pos_embed'] = np.zeros((1, 7, 128), np.float32)
  fails('pass --image-size', from_timm, tensors)
  assert from_timm(tensors, 2, (16, 24))[0].image_size == (16, 24)


def test_positions_that_fit_two_sizes(tensors):
  tensors['reg_token'] = np.zeros((1, 4, 128), np.float32)
  tensors['pos_embed'] = np.zeros((1, 9, 128), np.float32)  # 1 + 4 + 2x2, or 3x3 without the prefix
  fails('--image-size 16x16 or 24x24', from_timm, tensors)
  assert not from_timm(tensors, 2, (16, 16))[0].no_embed_class
  assert from_timm(tensors, 2, (24, 24))[0].no_embed_class


def test_width_that_tells_no_heads(tensors):
  narrow = {k: v for k, v in to_timm(*build('vit_micro/8', 16, dict(embed_dim=96, num_heads=3))).items()}
  fails(['width 96', '--num-heads'], from_timm, narrow)
  assert from_timm(narrow, 3)[0].num_heads == 3


@pytest.mark.parametrize(
  'name,size,options,words',
  [
    ('channel_vit_micro/8', 16, {}, '--format channelvit'),
    ('vit_micro/8', 16, dict(pos='rope'), "pos='rope'"),
    ('vit_micro/8', (16, 16, 16), {}, '2D'),
  ],
)
def test_what_timm_cannot_hold(name, size, options, words):
  fails(["format 'timm'", words], to_timm, *build(name, size, options))


@pytest.mark.parametrize(
  'name,size,options,words',
  [
    ('vit_micro/8', 16, {}, '--format timm'),
    ('channel_vit_micro/8', 16, dict(pos='rope'), "pos='rope'"),
    ('channel_vit_micro/8', 16, dict(pos_interpolation='antialias'), "'offset' only"),
    ('channel_vit_micro/8', (16, 24), {}, 'square'),
    ('channel_vit_micro/8x4', (16, 16), {}, 'square'),
    ('channel_vit_micro/8', (16, 16, 16), {}, '2D'),
    ('channel_vit_micro/8', 16, dict(num_registers=2), 'no registers'),
    ('channel_vit_micro/8', 16, dict(class_token=False), 'one class token'),
    ('channel_vit_micro/8', 16, dict(layer_scale=0.1), 'LayerScale'),
    ('channel_vit_micro/8', 16, dict(mlp='swiglu'), 'swiglu'),
  ],
)
def test_what_the_official_channelvit_cannot_hold(name, size, options, words):
  fails(["format 'channelvit'", words], to_channelvit, *build(name, size, options))


def test_official_class_is_square():
  tensors = to_channelvit(*build('channel_vit_micro/8', 16, {}))
  fails('square', from_channelvit, tensors, 2, (8, 32))
  tensors['pos_embed'] = tensors['pos_embed'][:, :4]
  fails('3 patch positions', from_channelvit, tensors)


def test_params_of_another_model(tmp_path, vit):
  model, params = vit
  out = tmp_path / 'x.safetensors'
  fails(
    ["'pos_embed'", '[5, 128]', '[10, 128]'],
    interop.export_file,
    out,
    'jaxmed',
    model.clone(image_size=(24, 24)),
    params,
    {},
  )
  del params['norm']
  fails(["'norm/bias' is nothing"], interop.export_file, out, 'timm', model, params, {})
  assert not out.exists()


def test_channel_names(tmp_path, tensors):
  path, out = save(tmp_path / 'x', tensors), tmp_path / 'out'
  fails(['names 3 channels', 'expected 2'], interop.import_file, path, 'timm', out, 4, None, ['a', 'b', 'c'])
  fails("'a' twice", interop.import_file, path, 'timm', out, 4, None, ['a', 'a'])
  assert not out.exists()


def test_place_that_cannot_be_written(tmp_path, vit):
  (tmp_path / 'file').write_text('x')
  fails(
    ['cannot write', 'file/x.safetensors'],
    interop.export_file,
    tmp_path / 'file' / 'x.safetensors',
    'timm',
    *vit,
    {},
  )


def test_full_disk(tmp_path, vit, monkeypatch):
  path = tmp_path / 'x.safetensors'
  interop.export_file(path, 'timm', *vit, {'first': True})

  def full(*args):
    raise safetensors.SafetensorError(os.strerror(errno.ENOSPC))

  monkeypatch.setattr('safetensors.numpy.save_file', full)
  fails('No space left', interop.export_file, path, 'timm', *vit, {})
  assert interop.load_file(path)[2] == {'first': True}  # the old file is whole
  assert len(list(tmp_path.iterdir())) == 1
