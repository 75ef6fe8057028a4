"""One file a format. `read(path, options)` yields the records of a file, whatever its format.

A record is a plain dict:

  image     ndarray, [H, W, C] or [D, H, W, C], uint8/int8/uint16/int16/uint32/int32 or float32
  channels  list of C distinct names
  spacing   list of mm along the grid axes (2 or 3 numbers), or None where the file does not say
  subject   str, the reader's own guess: the name of the file without its suffix
  source    str, the format
  part      str, '' or what was cut out of the file, e.g. 'z042'
  meta      dict (may be absent), what else the file tells: only keys of META
  mask      [H, W] or [D, H, W] integers (only where a mask was given), on the grid of the image
  content   share of the pixels that are no background (only with `Options.min_content`)

A reader's module gives volumes whole, marked by `volume`; `shaping` makes records of them. Its
`outline` gives the same from headers alone, with stand-ins for images. It raises ValueError (or whatever its decoder
raises) for a file that it cannot read whole: `prepare` lists it as a reject. Files of a kind in GROUPED belong
together: `groups` sorts them by their headers, `read_group` reads one group.
"""

from jaxmed.data.readers.dispatch import (
    digest_rows,
    groups,
    outline,
    outline_group,
    outline_parts,
    read,
    read_group,
    read_masks,
    read_parts,
    reader_of,
)
from jaxmed.data.readers.types import (
    CROPS,
    DEFAULT,
    GROUPED,
    MAX_BYTES,
    MAX_CHANNELS,
    META,
    NO_CONTENT,
    NO_IMAGE,
    PLANES,
    SLIDES,
    SUFFIXES,
    VOLUMES,
    Group,
    Masks,
    Options,
    Parts,
    Record,
    check_pixels,
    check_size,
    is_folder_format,
    kind,
    known,
    numbered,
    stand_in,
    stem,
    suffix,
    whole,
)

__all__ = [
    'CROPS', 'DEFAULT', 'GROUPED', 'Group', 'MAX_BYTES', 'MAX_CHANNELS', 'META', 'Masks', 'NO_CONTENT', 'NO_IMAGE',
    'Options', 'PLANES', 'Parts', 'Record', 'SLIDES', 'SUFFIXES', 'VOLUMES', 'check_pixels', 'check_size',
    'digest_rows', 'groups', 'is_folder_format', 'kind', 'known', 'numbered', 'outline', 'outline_group',
    'outline_parts', 'read', 'read_group', 'read_masks', 'read_parts', 'reader_of', 'stand_in', 'stem', 'suffix',
    'whole',
]
