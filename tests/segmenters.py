"""Segmentation networks of random weights for tests."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.models.registry import create_model
from jaxmed.objectives.dense.segment import Segment
from jaxmed.segmenter import Segmenter

CHANNELS = ({'name': 'T1', 'mean': 100.0, 'std': 20.0}, {'name': 'T2', 'mean': 50.0, 'std': 10.0})


@functools.lru_cache
def network(size, model, values, count):
  """An objective and weights; the linear decoder is the least that there is."""
  encoder = create_model(model, size, count, depth=1, embed_dim=16, num_heads=2)
  objective = Segment(encoder, decoder='linear', values=values)
  batch = {'image': jnp.zeros((1, *size, count)), 'channels': jnp.arange(count)[None]}
  shapes = nn.unbox(jax.eval_shape(lambda: objective.init(jax.random.key(0), batch)['params']))
  rng = np.random.default_rng(0)
  return objective, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes)


def segmenter(size=(8, 8), model='vit_micro/4', values=(0, 2, 7), channels=CHANNELS, **options):
  """With random weights."""
  return Segmenter(*network(size, model, values, len(channels)), channels, **options)


def stored(*shape, seed=0):
  """Noise of a stored type."""
  return np.random.default_rng(seed).integers(0, 200, shape).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def _logits(objective, params, image, ids):
  return objective.logits({'params': params}, {'image': image[None], 'channels': ids[None]})[0][0][0]


def direct(s, image, ids=(0, 1)):
  """Logits of one image [*image_size, C] that is normalised already."""
  return np.asarray(_logits(s.objective, s.params, jnp.asarray(image, jnp.float32), jnp.asarray(ids)))


@dataclasses.dataclass(frozen=True)
class Bright(Segment):
  """Of which the whole result is known: the second class is where the first channel is above 0, normalised."""

  def logits(self, variables, batch, train=False, rngs=None):
    x = batch['image'][..., :1]
    return (jnp.concatenate([-x, x], axis=-1),), {}


def bright(size=(8, 8, 8), level=100.0, channels=('T1',), **options):
  """A segmenter of two classes, 0 and 3: what is brighter than `level`."""
  encoder = network(size, 'vit_micro/4', (0, 3), len(channels))[0].encoder
  entries = tuple({'name': name, 'mean': level, 'std': 1.0} for name in channels)
  objective = Bright(encoder, decoder='linear', values=(0, 3), names=('background', 'lamp'))
  return Segmenter(objective, {'encoder': {}, 'decoder': {}}, entries, **{'tile': size} | options)
