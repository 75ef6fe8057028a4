"""From texts to ids: bytes, CLIP's pairs of bytes, any tokenizer.json, and vocabularies made of the corpus.

A tokenizer is plain data that a run keeps whole, so that nothing it was made from is needed again. Its `model` is a
JSON of the `tokenizers` package (tokenizer.json); what that package does not know lies beside it in
tokenizer_config.json: how texts are cleaned, how long ones end, and what padding is. Bytes need no package.
"""

import dataclasses
import functools
import html
import itertools
import json
import pathlib
import re
import string
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxmed import files
from jaxmed.errors import UserError, choose

BYTES = 'bytes'
FILES = ('tokenizer.json', 'tokenizer_config.json')
CLEANS = ('', 'canonicalize', 'clip')
TRAINED = ('wordpiece', 'bpe')
SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')  # BERT's, PAD first: padding is 0
MOST = 200_000  # texts that a vocabulary is made of
MERGES = 49152 - 256 - 2  # of CLIP: its file holds more
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # of CLIP: contractions, letters, digits, others
_WORD = re.compile(rb'[0-9A-Za-z\x80-\xff]+|[^\s0-9A-Za-z\x80-\xff]')  # words of bytes: runs of letters, single signs


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """What makes ids of a text.

  Attributes:
    model: JSON of the `tokenizers` package; '' for bytes, UTF-8 + 1.
    clean: what is done to a text first: 'clip' (open_clip: mended and unescaped, spaces made one, lower case),
      'canonicalize' (SigLIP: '_' is a space, no punctuation, lower case, spaces made one) or nothing.
    end: id that the last place of a text that is cut has, as CLIP has it; -1 for none.
    fill: id of the places after the end: 0 is padding, which models leave out; SigLIP repeats its end.
  """

  model: str = ''
  clean: str = ''
  end: int = -1
  fill: int = 0

  def __post_init__(self):
    choose('loader.text_clean', self.clean, CLEANS)

  @property
  def vocab_size(self) -> int:
    """One more than the largest id."""
    return 257 if not self.model else max(_engine(self.model).get_vocab().values()) + 1

  def encode(self, text: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a text and the number of each id's word, both [length] int32.

    Words are counted from 1; special ids, padding and what is cut have 0. An empty text is all padding.
    """
    ids, words = self._pieces(text)
    cut = len(ids) > length
    ids, words = ids[:length], words[:length]
    if cut and self.end >= 0:
      ids[-1], words[-1] = self.end, 0
    pad = (0, length - len(ids))
    return np.pad(ids, pad, constant_values=self.fill if len(ids) else 0), np.pad(words, pad)

  def count(self, text: str) -> int:
    """How many ids a text has, however long."""
    return len(self._pieces(text)[0])

  def save(self, folder: pathlib.Path) -> None:
    """Writes FILES into a folder, which `load` reads, the first one the `tokenizers` package, too."""
    own = {k: v for k, v in dataclasses.asdict(self).items() if k != 'model'}
    for name, text in zip(FILES, (self.model or '{}', json.dumps({'jaxmed': own})), strict=True):
      files.write_text(folder / name, text)

  def _pieces(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    text = cleaned(text, self.clean)
    if not text.strip():
      return np.zeros(0, np.int32), np.zeros(0, np.int32)
    if not self.model:
      return _bytes(text)
    found = _engine(self.model).encode(text)
    words = [0 if special or word is None else word + 1 for word, special in zip(
        found.word_ids, found.special_tokens_mask, strict=True)]
    return np.asarray(found.ids, np.int32), np.asarray(words, np.int32)


def load(path: str | pathlib.Path, clean: str = '') -> Tokenizer:
  """The tokenizer of a tokenizer.json, of a vocab.txt (BERT's WordPiece), or of a folder that has one of them.

  `clean` is that of a file that says nothing of it.

  Raises:
    UserError: no such file, or one that holds no tokenizer or pads with another id than 0.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    path = next((path / name for name in (FILES[0], 'vocab.txt') if (path / name).is_file()), path)
  if not path.is_file():
    raise UserError(f'loader.tokenizer={path}: expected bytes, clip, wordpiece:SIZE, bpe:SIZE, or a tokenizer.json, '
                    'vocab.txt or folder with one of them')
  if path.suffix == '.txt':
    return _of_vocabulary(path, clean)
  try:
    model, beside = path.read_text(encoding='utf-8'), path.with_name(FILES[1])
    own = json.loads(beside.read_text(encoding='utf-8')).get('jaxmed', {}) if beside.is_file() else {}
    made = Tokenizer('' if model == '{}' else model, **({'clean': clean} | own))
    _checked(made, path)
  except UserError:
    raise
  except Exception as e:  # the package raises bare Exceptions
    raise UserError(f'{path} is no tokenizer: {e}') from e
  return made


def of(words: str, clean: str, texts: Iterable[str]) -> Tokenizer:
  """The tokenizer that `loader.tokenizer` names: '' or 'bytes', 'clip', 'clip:MERGES', 'wordpiece:SIZE', 'bpe:SIZE' or
  a path; `texts` are what a vocabulary is made of.

  Raises:
    UserError: neither, or as of `load`.
  """
  name, _, rest = words.partition(':')
  if words in ('', BYTES):
    return Tokenizer(clean=clean)
  if name == 'clip':
    return clip(rest, clean or 'clip')
  if name in TRAINED:
    if not rest.isdigit() or not len(SPECIAL) + 1 < int(rest) <= 1_000_000:
      raise UserError(f'loader.tokenizer={words}: expected {name}:SIZE with a size of {len(SPECIAL) + 2} to 1000000, '
                      f'for example {name}:2000')
    return trained(name, int(rest), clean, texts)
  return load(words, clean)


def size_of(words: str) -> int:
  """The vocabulary of what `loader.tokenizer` names, the largest one of those that are made of texts."""
  name, _, rest = words.partition(':')
  if name in TRAINED and rest.isdigit():
    return int(rest)
  return 49408 if name == 'clip' else of(words, '', ()).vocab_size


def trained(kind: str, size: int, clean: str, texts: Iterable[str]) -> Tokenizer:
  """A vocabulary of at most `size` pieces of the first MOST texts, [CLS] before and [SEP] after each, in lower case.

  The same texts in the same order give the same vocabulary: the package numbers the signs within words at random, so
  they are given to it.

  Raises:
    UserError: no text, or more signs than pieces.
  """
  t, bpe = _package(), kind == 'bpe'
  engine = t.Tokenizer(t.models.BPE(unk_token='[UNK]') if bpe else t.models.WordPiece(unk_token='[UNK]'))
  engine.normalizer, engine.pre_tokenizer = t.normalizers.BertNormalizer(), t.pre_tokenizers.BertPreTokenizer()
  some = [*itertools.islice(filter(str.strip, (cleaned(text, clean) for text in texts)), MOST)]
  if not some:
    raise UserError(f'loader.tokenizer={kind}:{size}: no record to train on has a text to make a vocabulary of')
  signs = sorted({sign for text in some for sign in engine.normalizer.normalize_str(text) if not sign.isspace()})
  inner = [] if bpe else [f'##{sign}' for sign in signs]
  least = len(SPECIAL) + len(signs) + len(inner)
  if size < least:
    raise UserError(f'loader.tokenizer={kind}:{size}: the texts have {len(signs)} signs, expected a size of {least} or '
                    'more')
  train = t.trainers.BpeTrainer if bpe else t.trainers.WordPieceTrainer
  engine.train_from_iterator(some, train(vocab_size=size, special_tokens=[*SPECIAL, *inner], show_progress=False))
  whole = json.loads(engine.to_str())
  whole['added_tokens'] = [token for token in whole['added_tokens'] if token['content'] in SPECIAL]
  engine = t.Tokenizer.from_str(json.dumps(whole))
  _framed(engine, '[CLS]', '[SEP]')
  return Tokenizer(engine.to_str(), clean, engine.token_to_id('[SEP]'))


def clip(merges: str = '', clean: str = 'clip') -> Tokenizer:
  """CLIP's pairs of bytes, 49,408 of them (mlfoundations/open_clip, src/open_clip/tokenizer.py).

  Args:
    merges: bpe_simple_vocab_16e6.txt.gz; by default that of an installed open_clip.
  Raises:
    UserError: no such file.
  """
  import gzip
  import importlib.util
  if not merges:
    found = importlib.util.find_spec('open_clip')
    if found is None or found.origin is None:
      raise UserError('loader.tokenizer=clip reads the merges of open_clip: pip install open_clip_torch, or name the '
                      'file, loader.tokenizer=clip:bpe_simple_vocab_16e6.txt.gz')
    merges = str(pathlib.Path(found.origin).parent / 'bpe_simple_vocab_16e6.txt.gz')
  try:
    with gzip.open(merges, 'rt', encoding='utf-8') as f:
      lines = f.read().split('\n')[1:MERGES + 1]
    pairs = [tuple(line.split(' ')) for line in lines]
    if len(pairs) < MERGES or any(len(pair) != 2 for pair in pairs):
      raise ValueError(f'{len(pairs)} merges, expected {MERGES}')
  except (OSError, ValueError) as e:
    raise UserError(f'loader.tokenizer=clip:{merges}: {e}; expected bpe_simple_vocab_16e6.txt.gz') from e
  signs = _byte_signs()
  names = [*signs, *(s + '</w>' for s in signs), *(a + b for a, b in pairs), '<start_of_text>', '<end_of_text>']
  t = _package()
  engine = t.Tokenizer(t.models.BPE({name: i for i, name in enumerate(names)}, pairs, end_of_word_suffix='</w>'))
  engine.pre_tokenizer = t.pre_tokenizers.Sequence([
      t.pre_tokenizers.Split(t.Regex(PIECES), 'removed', invert=True),
      t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  _framed(engine, names[-2], names[-1])
  return Tokenizer(engine.to_str(), clean, len(names) - 1)


def cleaned(text: str, clean: str) -> str:
  """A text as its tokenizer takes it, see `Tokenizer.clean`."""
  if clean == 'clip':
    text = html.unescape(html.unescape(_mended(text)))
    return re.sub(r'\s+', ' ', text.strip()).strip().lower()
  if clean == 'canonicalize':
    text = text.replace('_', ' ').translate(str.maketrans('', '', string.punctuation)).lower()
    return re.sub(r'\s+', ' ', text).strip()
  return text


def _mended(text: str) -> str:
  """Wrongly decoded characters put right where `ftfy` is installed, as open_clip does."""
  try:
    import ftfy
  except ImportError:
    return text
  return ftfy.fix_text(text)


def _bytes(text: str) -> tuple[np.ndarray, np.ndarray]:
  """UTF-8 + 1, and the word of each byte."""
  raw = text.encode()
  words = np.zeros(len(raw), np.int32)
  for n, found in enumerate(_WORD.finditer(raw), 1):
    words[found.start():found.end()] = n
  return np.frombuffer(raw, np.uint8).astype(np.int32) + 1, words


def _of_vocabulary(path: pathlib.Path, clean: str) -> Tokenizer:
  """BERT's WordPiece of a vocab.txt; in lower case where no piece has a capital, but for [PAD] and the like."""
  pieces = path.read_text(encoding='utf-8').splitlines()
  lost = [name for name in SPECIAL[:4] if name not in pieces]
  if lost or pieces[0] != '[PAD]':
    raise UserError(f'{path}: expected a WordPiece vocabulary that begins with [PAD] and has '
                    f'{", ".join(SPECIAL[:4])}, a piece a line' + (f'; it has no {lost[0]}' if lost else ''))
  t = _package()
  lower = not any(p != p.lower() for p in pieces if not p.startswith('['))
  engine = t.Tokenizer(t.models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token='[UNK]'))
  engine.normalizer = t.normalizers.BertNormalizer(lowercase=lower, strip_accents=lower)
  engine.pre_tokenizer = t.pre_tokenizers.BertPreTokenizer()
  _framed(engine, '[CLS]', '[SEP]')
  return Tokenizer(engine.to_str(), clean, pieces.index('[SEP]'))


def _framed(engine: Any, first: str, last: str) -> None:
  """Puts an id before and one after each text."""
  t = _package()
  ids = [(name, engine.token_to_id(name)) for name in (first, last)]
  engine.post_processor = t.processors.TemplateProcessing(single=f'{first} $A {last}', special_tokens=ids)


def _checked(tokenizer: Tokenizer, path: pathlib.Path) -> None:
  """Raises a UserError where another id than 0 is what the file pads with."""
  if not tokenizer.model:
    return
  engine = _engine(tokenizer.model)
  named = next((i for name, i in engine.get_vocab().items() if name in ('[PAD]', '<pad>', '<|pad|>')), 0)
  if named:
    raise UserError(f'{path} pads with id {named}: expected a tokenizer whose padding is 0, such as one of BERT or '
                    'CLIP, or wordpiece:SIZE')


@functools.lru_cache(maxsize=8)
def _engine(model: str) -> Any:
  """The package's tokenizer, without padding and cuts of its own."""
  engine = _package().Tokenizer.from_str(model)
  engine.no_padding()
  engine.no_truncation()
  return engine


def _package() -> Any:
  try:
    import tokenizers
  except ImportError:
    raise UserError("loader.tokenizer needs the package tokenizers: pip install 'jaxmed[text]', or take bytes"
                    ) from None
  return tokenizers


def _byte_signs() -> list[str]:
  """The sign that stands for each byte, printable ones first (GPT-2's table, which CLIP's merges are written in)."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in printable]
  return [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
