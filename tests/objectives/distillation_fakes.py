"""What tests of self-distillation share: batches of crops, float64 restatements of networks' heads and of the losses."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import erf

from jaxmed.models import create_model
from tests.objectives.siamese_fakes import Conv, log_softmax, unit

TINY = dict(embed_dim=16, depth=1, num_heads=2)
HEAD = dict(out_dim=12, hidden_dim=8, bottleneck_dim=6)
SOFT = dict(start_temperature=0.2, teacher_temperature=0.3)  # so that distributions are not all but one-hot
CASES = {'vit': ('vit_micro/4', (16, 16)), 'channel': ('channel_vit_micro/4', (16, 16)),
         'channel 3D': ('channel_vit_micro/2x4x4', (4, 16, 16))}


def encoder(kind, **options):
  if kind == 'conv':
    return Conv(image_size=(16, 16))
  name, size = CASES[kind]
  return create_model(name, size, 2, **(TINY | options))


def crops(rng, count, views, size, missing, teacher=False):
  """A group of noise; with `missing` each view lacks some channels, whose pixels are NaN; the teacher may see more."""
  own = 2 * rng.normal(size=(count, 1, *[1] * len(size), 2))  # samples differ more than their crops
  image = own + rng.normal(size=(count, views, *size, 2))
  out = {'channels': jnp.broadcast_to(jnp.arange(2), (count, views, 2))}
  if missing:
    there = rng.random((count, 1, 2)) < 0.7
    there[..., 0] |= ~there.any(axis=-1)
    there[0] = True
    there = np.broadcast_to(there, (count, views, 2)).copy()
    seen = there & (rng.random(there.shape) < 0.7)
    seen = np.where(seen.any(axis=-1, keepdims=True), seen, there)
    seen[0, 0] = [True, False]  # at least here the student sees less
    image = np.where(there.reshape(count, views, *[1] * len(size), 2), image, np.nan)
    out |= {'channel_mask': jnp.asarray(seen)} | ({'teacher_mask': jnp.asarray(there)} if teacher else {})
  return out | {'image': jnp.asarray(image, jnp.float32)}


def batch(kind='vit', count=4, local=3, gram=0, missing=None, seed=0):
  """Two global crops, `local` small ones, and crops of `gram` times the size for the Gram teacher."""
  rng = np.random.default_rng(seed)
  size = encoder(kind).image_size
  missing = kind.startswith('channel') if missing is None else missing
  out = {'global': crops(rng, count, 2, size, missing, teacher=True),
         'label': jnp.zeros(count, jnp.int32), 'index': jnp.arange(count)}
  if local:
    out['local'] = crops(rng, count, local, (*size[:-2], 8, 8), missing)
  if gram:
    image = np.repeat(np.repeat(np.asarray(out['global']['image']), gram, axis=-2), gram, axis=-3)
    shown = {'channel_mask': out['global']['teacher_mask']} if missing else {}
    out['gram'] = {'image': jnp.asarray(image), 'channels': out['global']['channels']} | shown
  return out


def start(method, kind='vit', data=None, options=None, **fields):
  """(objective, unboxed variables with every entry random and another teacher, batch), without compiling init."""
  data = batch(kind) if data is None else data
  objective = method(encoder(kind, **(options or {})), **(HEAD | SOFT | fields))
  shapes = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0), data))
  rng = np.random.default_rng(1)

  def draw(path, x):
    base = {'scale': 1.0, 'var': 1.0, 'length': 1.0}.get(getattr(path[-1], 'key', ''), 0.0)
    return jnp.asarray(base + (0.1 if path[-1].key == 'bias' else 0.4) * rng.normal(size=x.shape) * (path[-1].key not in ('mean', 'var')), x.dtype)

  return objective, jax.tree_util.tree_map_with_path(draw, shapes), data


@functools.partial(jax.jit, static_argnums=0, static_argnames='train')
def _loss(objective, variables, data, key, step, train):
  return objective.loss(variables, data, key, step, train)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(objective, variables, data, key, step):
  loss = lambda v: objective.loss(v, data, key, step)[0]
  return jax.value_and_grad(loss)(variables)


def evaluate(objective, variables, data, step=0, train=True, seed=3):
  """(loss, (metrics, extra)); compiled once for equal objectives and shapes."""
  return _loss(objective, variables, data, jax.random.key(seed), step, train=train)


def gradients(objective, variables, data, step=0, seed=3):
  """(loss, its gradient by params, target and extra)."""
  return _gradients(objective, variables, data, jax.random.key(seed), step)


def largest(tree):
  """The largest absolute entry; NaN where something is not finite."""
  return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnums=0, static_argnames='local')
def _features(module, params, image, channels, mask, hidden, **kwargs):
  more = kwargs if hidden is None else kwargs | {'hidden': hidden}
  out = module.apply({'params': params}, image, channels, mask, False, **more)
  return out.pooled('cls'), out.patches


def head(params, x, last):
  """Logits [..., K] of x [..., D] in float64."""
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  for i in range(sum(name.startswith('dense') for name in params)):
    x = x @ params[f'dense{i}']['kernel'] + params[f'dense{i}']['bias']
    x = 0.5 * x * (1 + erf(x / np.sqrt(2)))
  x = unit(x @ params['bottleneck']['kernel'] + params['bottleneck']['bias'])
  kernel = params['last']['kernel']
  if last != 'linear':
    kernel = kernel / np.linalg.norm(kernel, axis=0)
  return x @ (kernel * params['last']['length'] if last == 'weight_norm' else kernel)


def softmax(x):
  return np.exp(log_softmax(x))


def views(objective, params, group, mask='channel_mask', hidden=None, **kwargs):
  """Class vectors [B, V, D] and patches [B, V, N, D] in float64, one view at a time, without anything random."""
  shown, vectors, patches = group.get(mask, group.get('channel_mask')), [], []
  for v in range(group['image'].shape[1]):
    out = _features(objective.encoder, params['encoder'], group['image'][:, v], group['channels'][:, v],
                    None if shown is None else shown[:, v], None if hidden is None else jnp.asarray(hidden[:, v]),
                    **kwargs)
    vectors.append(np.asarray(out[0], np.float64))
    patches.append(np.asarray(out[1], np.float64))
  return np.stack(vectors, axis=1), np.stack(patches, axis=1)


def valid(objective, group):
  """Tokens [B, V, N] that student and teacher both have."""
  tokens = np.prod([n // p for n, p in zip(group['image'].shape[2:-1], objective.encoder.patch_size)])
  if not objective.encoder.per_channel:
    return np.ones((*group['image'].shape[:2], tokens), bool)
  both = np.ones(group['channels'].shape, bool)
  for name in ('channel_mask', 'teacher_mask'):
    both &= np.asarray(group.get(name, both))
  return np.repeat(both, tokens, axis=-1)


def dino(student, teacher, temperature=0.1, local_weight=1.0):
  """The class token loss by loops over pairs."""
  total, pairs = 0.0, 0
  for t in range(teacher.shape[1]):
    for s in range(student.shape[1]):
      if s != t:
        each = -(teacher[:, t] * log_softmax(student[:, s] / temperature)).sum(axis=-1).mean()
        total += each * (local_weight if s >= teacher.shape[1] else 1.0)
        pairs += 1
  return total / pairs


def ibot(student, teacher, marked, temperature=0.1):
  """The patch loss by loops over crops; all arguments [B, V, N, ...]."""
  crops = []
  for b, v in np.ndindex(*marked.shape[:2]):
    each = -(teacher[b, v] * log_softmax(student[b, v] / temperature)).sum(axis=-1)
    crops.append(each[marked[b, v]].sum() / max(marked[b, v].sum(), 1))
  return np.mean(crops)


def sinkhorn(logits, temperature, iterations=3):
  """DINOv2's assignments of rows [B, K]."""
  q = np.exp(logits / temperature).T
  q = q / q.sum()
  for _ in range(iterations):
    q = q / q.sum(axis=1, keepdims=True) / q.shape[0]
    q = q / q.sum(axis=0, keepdims=True) / q.shape[1]
  return (q * q.shape[1]).T


def koleo(x, eps=1e-8):
  x = unit(x)
  near = (x @ x.T - 3 * np.eye(len(x))).argmax(axis=1)
  return -np.log(np.sqrt(((x - x[near] + eps) ** 2).sum(axis=1)) + eps).mean()


def gram(student, teacher, there):
  """Mean over existing pairs of tokens of all crops [R, N, D]."""
  total, pairs = 0.0, 0
  for s, t, ok in zip(student, teacher, there):
    error = (unit(s[ok]) @ unit(s[ok]).T - unit(t[ok]) @ unit(t[ok]).T) ** 2
    total, pairs = total + error.sum(), pairs + error.size
  return total / pairs


def permuted(tree, order):
  return jax.tree.map(lambda x: x[order], tree)
