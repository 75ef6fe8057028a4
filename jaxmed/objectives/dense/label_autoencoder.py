"""Label autoencoder: learns what masks look like by making them whole again (Adiga et al. 2023, arXiv 2310.16099)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.augment.labels import corrupted
from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError
from jaxmed.models.decoders.labels import LabelDecoder, clipped
from jaxmed.models.layers.tokens import Features, grid_of
from jaxmed.objectives.base import Method
from jaxmed.objectives.dense.segment import check_values
from jaxmed.objectives.losses import segmentation as losses
from jaxmed.objectives.networks import inputs, run, with_stats


@dataclasses.dataclass(frozen=True)
class LabelAutoencoder(Method):
  """Masks in, masks out, through a code: the loss is half of squared error plus 1 minus soft Dice of sigmoids.

  adigasu/Anatomically-aware_Uncertainty_for_Semi-supervised_Segmentation, code_DAE/train_DAE.py. The numbers of the
  classes are one float channel, as there: the encoder's first channel, the others are 0. Images are not looked at. The
  code binds the size of an image, and the batch norms of the decoder see the global batch. Unknown pixels are
  background in the input and count nowhere in the loss; nor do classes that are not annotated in a sample. Held-out
  masks go in as they are. The encoder of such a run reads maps of classes. Parameters: {'encoder', 'decoder'}.

  Attributes:
    values: stored values of masks that are classes, rising; 0 is the background. Filled in from the training records.
    ignore: stored values that are no class, as -1 never is.
    code: numbers of the code.
    depths: layers of each stage of the decoder, from the code on; the last one of those that follow.
    corruption: probability of each of the two changes of a slice, see `augment.labels`.
    noise: deviation of noise on the numbers of the classes, cut at two of them.
    code_noise: the same on the code. Published runs train without, and use it with 0.01.
  """

  encoder: Encoder
  values: tuple[int, ...] = ()
  ignore: tuple[int, ...] = ()
  code: int = 512
  depths: tuple[int, ...] = (3, 3, 2, 1)
  corruption: float = 0.2
  noise: float = 0.1
  code_noise: float = 0.0
  names: tuple[str, ...] = ()  # of `values`
  stored: tuple[int, ...] = ()  # values of all classes of the corpus, which `annotated` goes by; () for `values`

  LEARNING_RATE: ClassVar = (1e-3, 16)  # AdamW's usual one; the published rate is SGD's
  FEATURE: ClassVar[str] = ''
  FIELDS: ClassVar[tuple[str, ...]] = ('image', 'mask', 'annotated')
  REQUIRED: ClassVar[tuple[str, ...]] = ('mask',)
  PREDICTS: ClassVar[str] = 'mask'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'checkpoint': {'best': 'dice', 'best_mode': 'max'},
      'augment': {'scale': (0.8, 1.0), 'ratio': (1.0, 1.0)},
  }

  def __post_init__(self):
    check_values(self.values, self.ignore)
    if not 0 <= self.corruption <= 1 or min(self.noise, self.code_noise) < 0:
      raise UserError(f'objective.corruption {self.corruption} must lie in [0, 1], noise {self.noise} and code_noise '
                      f'{self.code_noise} be at least 0')
    if self.code < 1 or not self.depths or min(self.depths) < 0:
      raise UserError(f'objective.code {self.code} must be positive, depths {self.depths} at least one number from 0')

  @property
  def network(self) -> LabelDecoder:
    """The decoder."""
    if len(self.values) < 2:
      raise UserError('a label autoencoder needs masks of at least two classes; objective.values says which')
    return LabelDecoder(len(self.values), tuple(self.encoder.image_size), self.code, self.depths, self.encoder.dtype)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch."""
    keys = jax.random.split(rng)
    shown = self._shown(jnp.zeros(batch['image'].shape[:-1]), {})
    encoder = self.encoder.init(keys[0], **shown)['params']
    found = jax.eval_shape(lambda p: self._map(self.encoder.apply({'params': p}, **shown)), nn.unbox(encoder))
    decoder = self.network.init(keys[1], jnp.zeros(found.shape))['params']
    return {'params': {'encoder': encoder, 'decoder': decoder}, 'target': {}, 'extra': {}}

  def reconstruct(self, params: Any, classes: jax.Array, batch: Batch | None = None, train: bool = False,
                  rng: jax.Array | None = None) -> tuple[jax.Array, dict[str, Any]]:
    """(Logits [B, *size, K] of maps of classes [B, *size], of which each has its own sigmoid; running statistics).

    Without rng there is no noise; in evaluation there is that on the code alone.
    """
    x = classes.astype(jnp.float32)
    noise_key, code_key = (None, None) if rng is None else jax.random.split(rng)
    if train and noise_key is not None:
      x = x + clipped(noise_key, x.shape, self.noise)
    rngs = None if rng is None else {'dropout': code_key}
    features, encoder = run(self.encoder, params['encoder'], **self._shown(x, batch or {}), train=train, rngs=rngs)
    out, decoder = run(self.network, params['decoder'], self._map(features), train=train, rngs=rngs,
                       noise=0.0 if rng is None else self.code_noise)
    return out, {'encoder': encoder, 'decoder': decoder}

  def truth(self, batch: Batch) -> losses.Truth:
    """The labels of a batch."""
    return losses.of_batch(batch, self.values, self.stored)

  def logits(self, variables: Variables, batch: Batch, train: bool = False,
             rngs: Any = None) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """(([B, *size, K],) of the masks of a batch, running statistics of 'encoder' and 'decoder')."""
    rng = (rngs or {}).get('dropout')
    out, stats = self.reconstruct(variables['params'], _known(self.truth(batch)), batch, train, rng)
    return (out,), stats

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Half of squared error and 1 minus soft Dice over the known pixels of the global batch."""
    del step
    truth, keys = self.truth(batch), jax.random.split(rng)
    classes = _known(truth)
    classes = corrupted(keys[0], classes, self.corruption) if train else classes
    logits, stats = self.reconstruct(variables['params'], classes, batch, train, keys[1])
    error, dice = reconstruction_loss(logits, truth)
    metrics = {'squared_error': error, 'soft_dice': dice,
               'batch_dice': losses.hard_dice(jax.lax.stop_gradient(logits), truth)}
    return 0.5 * (error + 1 - dice), (with_stats(metrics, train, **stats), variables['extra'])

  def pictures(self, variables: Variables, batch: Batch, rng: jax.Array) -> Mapping[str, Any]:
    """'segmentation': the image, a corrupted mask and what is made of it, [B, *size] in stored values."""
    stored = jnp.asarray(self.values)
    classes = corrupted(rng, _known(self.truth(batch)), self.corruption)
    found = self.reconstruct(variables['params'], classes, batch)[0].argmax(axis=-1)
    return {'segmentation': (batch['image'], stored[classes], stored[found])}

  def _shown(self, x: jax.Array, batch: Any) -> Batch:
    """What the encoder takes of numbers of classes [B, *size]: its first channel."""
    count = 1 if self.encoder.per_channel else self.encoder.in_channels
    image = jnp.pad(x[..., None], [(0, 0)] * x.ndim + [(0, count - 1)])
    channels = jnp.broadcast_to(jnp.arange(count), (len(x), count))
    shown: Any = {**{k: batch[k] for k in ('sizes',) if k in batch}, 'image': image, 'channels': channels}
    return inputs(shown)

  def _map(self, features: Features) -> jax.Array:
    """The last map [B, *grid, D] of the one channel; 0 beyond an image."""
    x = features.patches
    x = x if features.valid is None else jnp.where(features.valid[..., None], x, 0)
    return x.reshape(len(x), *grid_of(self.encoder.image_size, self.encoder.patch_size), x.shape[-1])


def reconstruction_loss(logits: jax.Array, truth: losses.Truth) -> tuple[jax.Array, jax.Array]:
  """(Mean of (sigmoid - one-hot)^2, soft Dice of the batch with squares below) over known pixels and annotated classes.

  code_DAE/train_DAE.py and utils/losses.py:dice_loss_all, of the same repository.
  """
  logp, t = jax.nn.log_sigmoid(logits), losses.one_hot(truth, logits.shape[-1])
  counts = jnp.broadcast_to(truth.known[..., None], t.shape)
  if truth.annotated is not None:
    counts = counts & jnp.expand_dims(truth.annotated, tuple(range(1, t.ndim - 1)))
  square = jnp.where(counts, jnp.square(jnp.exp(logp) - t), 0).sum() / jnp.maximum(counts.sum(dtype=jnp.float32), 1)
  return square, losses.soft_dice(logp, truth, batch=True, squared=True)


def _known(truth: losses.Truth) -> jax.Array:
  """Numbers of the classes [B, *size] int32; what is unknown is the background."""
  return jnp.where(truth.known, truth.classes, max(truth.background, 0))
