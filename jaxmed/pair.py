"""Images and texts of a run as vectors of one width that are compared: `Encoder.pair`, and the tower of texts."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.data.feed.fields import TEXT_LENGTH
from jaxmed.data.feed.texts import Texts
from jaxmed.encoder import Encoder, in_batches
from jaxmed.errors import UserError

PLAIN = Texts()  # the column text, as bytes


@dataclasses.dataclass(frozen=True)
class Pair:
  """What makes comparable vectors of an encoder's features and of texts.

  Attributes:
    objective: the method that compares, see `objectives.paired.clip.Paired`: `image_vectors`, `text_vectors`, `logits`
      and `fresh`.
    params: its weights without those of the encoder.
    length: ids of a text; longer ones are cut.
    wording: which columns of a record its text is in, and the tokenizer.
  """

  objective: Any
  params: Any
  length: int = TEXT_LENGTH
  wording: Texts = PLAIN

  @property
  def feature(self) -> str:
    """The vector of an image that is compared: 'cls' or 'mean'."""
    return self.objective.feature

  @property
  def scale(self) -> float:
    """What cosines are multiplied by."""
    return float(self.objective.logits(self.params)[0])

  def images(self, features: np.ndarray) -> np.ndarray:
    """Unit vectors [..., D] float32 of features [..., W], those of `feature`."""
    found = self.objective.image_vectors(self.params, jnp.asarray(features, jnp.float32))
    return unit(np.asarray(found))

  def texts(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """Unit vectors [N, D] float32 of texts."""
    return unit(self.text_vectors(texts, batch_size))

  def text_vectors(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """Vectors [N, D] float32 of texts, as the tower gives them."""
    if not len(texts):
      raise UserError('there is no text to embed')
    run = lambda ids: {'vector': _texts(self.objective, self.params, ids)}
    return in_batches(run, min(batch_size, len(texts)), tokenize(self, texts))['vector'].astype(np.float32)

  def untrained(self, seed: int = 0) -> 'Pair':
    """The same with fresh random weights."""
    params = jax.tree.map(jnp.asarray, nn.unbox(self.objective.fresh(jax.random.key(seed), self.length)))
    return dataclasses.replace(self, params=params)


@dataclasses.dataclass(frozen=True)
class TextEncoder:
  """The tower of texts of a run, asked of records as an `Encoder` is: `jaxmed.load(RUN, tower='text')`.

  Attributes:
    encoder: that of the images of the run; it says which images a baseline of pixels reads.
  """

  encoder: Encoder
  feature: str = 'mean'
  tower: ClassVar[str] = 'text'

  @property
  def info(self) -> dict[str, Any]:
    """What else is known of the run."""
    return self.encoder.info

  @property
  def vocabulary(self) -> tuple[str, ...]:
    """Channels of the images."""
    return self.encoder.vocabulary

  @property
  def ids(self) -> dict[str, int]:
    """The id of each channel."""
    return self.encoder.ids

  @property
  def image_size(self) -> tuple[int, ...]:
    """The grid of the images."""
    return self.encoder.image_size

  def embed(self, texts: Sequence[str], batch_size: int = 64) -> dict[str, np.ndarray]:
    """{'mean': [N, D] float32} of texts: vectors as the tower gives them, not of length 1."""
    return {'mean': self.encoder.pair.text_vectors(texts, batch_size)}

  def embed_source(self, source: Any, batch_size: int = 64, dense: bool = False, levels: Sequence[int] = ()
                   ) -> dict[str, np.ndarray]:
    """The same of the texts of all rows of a source, in order; a row without a text has the vector of an empty one.

    Raises:
      UserError: the source has no texts, or patches are asked for.
    """
    if dense or levels:
      raise UserError('the tower of texts has no patches of images: leave dense features out, or ask --tower image')
    return self.embed([t or '' for t in texts_of(source, self.encoder.pair.wording)], batch_size)

  def untrained(self, seed: int = 0) -> 'TextEncoder':
    """The same with fresh random weights."""
    return dataclasses.replace(self, encoder=self.encoder.untrained(seed))


@dataclasses.dataclass(frozen=True)
class Joint:
  """Images and texts of records as one vector, of which a part may be missing: `jaxmed.load(RUN, tower='image+text')`.

  The vector is the unit vectors of both, one after the other; what a record lacks, or does not show, is 0.
  """

  encoder: Encoder
  feature: str = 'mean'
  modalities: tuple[str, ...] = ('image', 'text')
  tower: ClassVar[str] = 'image+text'

  @property
  def info(self) -> dict[str, Any]:
    """What else is known of the run."""
    return self.encoder.info

  @property
  def vocabulary(self) -> tuple[str, ...]:
    """Channels of the images."""
    return self.encoder.vocabulary

  @property
  def ids(self) -> dict[str, int]:
    """The id of each channel."""
    return self.encoder.ids

  @property
  def image_size(self) -> tuple[int, ...]:
    """The grid of the images."""
    return self.encoder.image_size

  def embed_source(self, source: Any, batch_size: int = 64, dense: bool = False, levels: Sequence[int] = ()
                   ) -> dict[str, np.ndarray]:
    """{'mean': [N, 2 D] float32} of all rows of a source, in order."""
    if dense or levels:
      raise UserError('images and texts together have no patches: leave dense features out, or ask --tower image')
    return {'mean': self.embed_subsets(source, [self.modalities], batch_size)[0]}

  def embed_subsets(self, source: Any, subsets: Sequence[Sequence[str]], batch_size: int = 64,
                    feature: str = 'mean') -> np.ndarray:
    """Vectors [S, N, 2 D] float32 of all rows, once for each subset of the modalities that they show."""
    del feature
    pair = pair_of(self.encoder, 'image+text')
    texts = texts_of(source, pair.wording)
    image = pair.images(self.encoder.embed_source(source, batch_size)[pair.feature])
    words = pair.texts([t or '' for t in texts], batch_size) * np.array([t is not None for t in texts])[:, None]
    parts = {'image': image, 'text': words}
    return np.stack([np.concatenate([parts[m] * (m in shown) for m in self.modalities], axis=1) for shown in subsets])

  def held(self, source: Any) -> list[list[str]]:
    """The modalities that each row of a source has."""
    texts = texts_of(source, self.encoder.pair.wording)
    return [[m for m in self.modalities if m != 'text' or t is not None] for t in texts]

  def untrained(self, seed: int = 0) -> 'Joint':
    """The same with fresh random weights."""
    return dataclasses.replace(self, encoder=self.encoder.untrained(seed))


def tokenize(pair: Pair, texts: Sequence[str]) -> np.ndarray:
  """The ids [N, L] int32 of texts, as the run was trained with."""
  return np.stack([pair.wording.tokenizer.encode(text, pair.length)[0] for text in texts])


def pair_of(encoder: Any, what: str) -> Pair:
  """The pair of an encoder; a UserError, which names `what` needs it, where it has none."""
  pair = getattr(encoder, 'pair', None)
  if pair is None:
    method = getattr(encoder, 'info', {}).get('method', '')
    if getattr(encoder, 'tower', ''):
      raise UserError(f'{what} compares both towers: leave --tower out')
    raise UserError(f'{what} needs a run with a tower of texts, such as of method clip or siglip'
                    + (f', not {method}' if method else ''))
  return pair


def texts_of(source: Any, wording: Texts = PLAIN) -> list[str | None]:
  """The text of each row of a source, as a run reads it without a draw, None without one; a UserError where no row has
  one."""
  lost = [name for name in wording.columns if name not in source.table.column_names]
  found = [] if lost else [wording.of(source, i) for i in range(len(source))]
  if not any(found):
    raise UserError(f'{getattr(source, "path", "the source")} has no texts: expected the column '
                    f'{", ".join(lost or wording.columns)}, as prepare makes of a table with one')
  return [t or None for t in found]


def unit(x: np.ndarray) -> np.ndarray:
  """Rows of length 1, as float32; zeros stay."""
  x = np.asarray(x, np.float32)
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _apply(objective, params, ids):
  return objective.text_vectors(params, ids)


_texts = jax.jit(_apply, static_argnums=0)
