"""CLIP: an image and its own text have like vectors, others unlike ones (Radford et al. 2021, arXiv 2103.00020)."""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError
from jaxmed.models.layers.linear import Dense
from jaxmed.models.layers.norm import normalize
from jaxmed.models.text import registry as texts
from jaxmed.objectives import networks
from jaxmed.objectives.base import Method
from jaxmed.objectives.contrastive import siamese
from jaxmed.objectives.losses import paired
from jaxmed.objectives.networks import with_stats

TEXT = 'text'  # the tower of texts


@dataclasses.dataclass(frozen=True)
class Paired(Method):
  """What methods of images and their texts share: two towers, whose vectors a linear layer each brings to one width.

  Both towers are products; that of texts has its projection. Records without a text are not trained on; in a held-out
  batch they are no pair. Cosines are multiplied by exp(s) with a trained s.

  Attributes:
    out_dim: width of the vectors that are compared.
    temperature: 1 / exp(s) in the beginning.
    max_scale: the largest exp(s); 0 for no limit. s is at least 0 then, too.
    feature: 'cls' or 'mean', the vector of an image.
    project: whether a linear layer brings that vector to `out_dim`. SigLIP compares it as it is (encoder.map_head), and
      `out_dim` is the encoder's width.
    chunk: candidates that are compared at a time, 0 for all at once, -1 chooses (see contrast.log_partition).
    towers: of texts; the run fills it in.
  """

  encoder: Encoder
  out_dim: int = 512
  temperature: float = 0.07
  max_scale: float = 100.0
  feature: str = 'cls'
  project: bool = True
  chunk: int = -1
  towers: FrozenDict = FrozenDict()

  TEXT_BIAS: ClassVar[bool] = False
  TOWERS: ClassVar[tuple[str, ...]] = ('image', TEXT)
  FIELDS: ClassVar[tuple[str, ...]] = ('image', 'text')
  REQUIRED: ClassVar[tuple[str, ...]] = ('text',)
  LEARNING_RATE: ClassVar = (1e-3, 1024)  # open_clip's README: --batch-size=128 on each of 8 GPUs, --lr=1e-3
  FEATURE: ClassVar[str] = 'cls'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'towers': {TEXT: {'model': 'text_micro'}},
      'optimizer': {'b2': 0.98, 'weight_decay': 0.2},
      'augment': {'scale': (0.9, 1.0), 'flip': (0.0,)},  # texts tell left from right
  }

  def __post_init__(self):
    siamese.check(self.feature, out_dim=self.out_dim, temperature=self.temperature)
    if self.max_scale and self.max_scale < 1 / self.temperature:
      raise UserError(f'objective.max_scale {self.max_scale} must be 0 or at least 1 / temperature, '
                      f'{1 / self.temperature:g}')
    if not self.project and self.out_dim != self.encoder.embed_dim:
      raise UserError(f'objective.project=False compares vectors of the encoder, of width {self.encoder.embed_dim}: '
                      f'set objective.out_dim={self.encoder.embed_dim}')
    tower = self.towers.get(TEXT)
    if tower is not None and not isinstance(tower, texts.CLASSES):
      raise UserError(f'towers.{TEXT} must be a model of texts, such as towers.{TEXT}.model=text_micro, not a '
                      f'{type(tower).__name__}')

  @property
  def text(self) -> Any:
    """The tower of texts with its projection."""
    return self.towers[TEXT].clone(out_dim=self.out_dim, out_bias=self.TEXT_BIAS)

  @property
  def projection(self) -> Dense:
    """The projection of an image's vector."""
    return Dense((self.out_dim,), ('embed', None), use_bias=False)

  def model_of(self, tower: str) -> Any:
    """The encoder, or the tower of texts with its projection."""
    return self.text if tower == TEXT else super().model_of(tower)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch."""
    keys = jax.random.split(rng, 3)
    params = {'encoder': self.encoder.init(keys[0], **networks.inputs(batch))['params'],
              TEXT: self.text.init(keys[1], batch['text'])['params'],
              'similarity': self.similarity()}
    if self.project:
      params['projection'] = siamese.init_head(self.projection, keys[2], self.encoder.embed_dim)
    return {'params': params, 'target': {}, 'extra': {}}

  def similarity(self) -> dict[str, jax.Array]:
    """What is trained of the logits: {'scale': s}."""
    return {'scale': jnp.asarray(-math.log(self.temperature), jnp.float32)}

  def fresh(self, rng: jax.Array, length: int) -> Any:
    """Boxed weights of all but the encoder, for texts of `length` ids."""
    keys = jax.random.split(rng)
    out = {TEXT: self.text.init(keys[0], jnp.zeros((1, length), jnp.int32))['params'], 'similarity': self.similarity()}
    if self.project:
      out['projection'] = siamese.init_head(self.projection, keys[1], self.encoder.embed_dim)
    return out

  def image_vectors(self, params: Any, features: jax.Array) -> jax.Array:
    """Vectors [..., out_dim] that are compared, of features [..., W] of images."""
    return self.projection.apply({'params': params['projection']}, features) if self.project else features

  def text_vectors(self, params: Any, ids: jax.Array) -> jax.Array:
    """The same of the ids [B, L] of texts."""
    return networks.run(self.text, params[TEXT], ids)[0].mean

  def logits(self, params: Any) -> tuple[jax.Array, jax.Array]:
    """What cosines are multiplied by, and what is added then (0 where nothing is)."""
    found = params['similarity']
    return jnp.exp(self.scale_of(found)), found.get('bias', jnp.zeros(()))

  def scale_of(self, similarity: Any) -> jax.Array:
    """s, kept within its limits."""
    return bounded(similarity['scale'], math.log(self.max_scale)) if self.max_scale else similarity['scale']

  def compared(self, image: jax.Array, text: jax.Array, similarity: Any, batch: Batch
               ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Loss and accuracies both ways of vectors [B, out_dim], of which the pairs with a text count."""
    raise NotImplementedError

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """The loss over the pairs of the global batch."""
    del step
    params, keys = variables['params'], jax.random.split(rng)
    features, stats = networks.encode(self.encoder, params['encoder'], batch, train, {'dropout': keys[0]})
    image = self.image_vectors(params, features.pooled(self.feature))
    words, _ = networks.run(self.text, params[TEXT], batch['text'], train=train, rngs={'dropout': keys[1]})
    text, counts = words.mean, worded(batch)
    loss, (there, back) = self.compared(image, text, params['similarity'], batch)
    metrics = {'image_to_text': there, 'text_to_image': back,
               'logit_scale': jnp.exp(self.scale_of(params['similarity'])),
               'image_likeness': likeness(image, counts), 'text_likeness': likeness(text, counts)}
    return loss, (with_stats(metrics, train, encoder=stats), variables['extra'])


@dataclasses.dataclass(frozen=True)
class CLIP(Paired):
  """Cross-entropy of finding the text of an image among all texts of the batch, and the image of a text.

  Differs from open_clip: s is kept in [0, ln 100] where it is read, and no gradient pushes it further out (there it is
  clipped after each step); weights of embeddings do not decay; the encoder has a norm before its first block where
  encoder.pre_norm says so, as the recipe does.

  Attributes:
    weight: of the search from images to texts; 1 - weight is that of the other. ConVIRT's lambda is 0.75.
  """

  weight: float = 0.5

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.weight <= 1:
      raise UserError(f'objective.weight {self.weight} must lie in [0, 1]')

  def compared(self, image: jax.Array, text: jax.Array, similarity: Any, batch: Batch
               ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """InfoNCE both ways."""
    return paired.clip(image, text, self.scale_of(similarity), worded(batch), self.weight, self.chunk)


def worded(batch: Batch) -> jax.Array:
  """Which records have a text, [B] bool."""
  return (batch['text'] != 0).any(axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def bounded(x: jax.Array, top: float) -> jax.Array:
  """x in [0, top]; the gradient of x itself, but 0 where a step along it would lead further out."""
  return jnp.clip(x, 0.0, top)


bounded.defvjp(lambda x, top: (bounded(x, top), x),
               lambda top, x, g: (jnp.where(((x >= top) & (g < 0)) | ((x <= 0) & (g > 0)), 0.0, g),))


def likeness(x: jax.Array, counts: jax.Array) -> jax.Array:
  """Mean cosine of vectors [B, D] of different records among those that count; 1 where all are the same."""
  z, count = jnp.where(counts[:, None], normalize(jax.lax.stop_gradient(x)), 0), counts.sum().astype(jnp.float32)
  return (jnp.square(z.sum(axis=0)).sum() - count) / jnp.maximum(count * (count - 1), 1)
