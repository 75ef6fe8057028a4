"""DiChaViT's losses against plain loops in float64, their limits, and what they train."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.objectives.losses.diversity import Diversity, channel_diversity, token_diversity
from jaxmed.objectives.supervised.supervised import Supervised

RNG = np.random.default_rng(5)
TINY = dict(embed_dim=16, depth=1, num_heads=2)


def normal(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def channel_reference(vectors, proxies, present, temperature, classes=None):
  scale, rows = temperature**-0.5, np.flatnonzero(present)
  columns = rows if classes is None else np.flatnonzero(classes)
  a, b = scale * normal(vectors[rows].astype(np.float64)), scale * normal(proxies[columns].astype(np.float64))
  total = 0.0
  for i, row in enumerate(rows):
    logits = [-((a[i] - b[j]) ** 2).sum() for j in range(len(columns))]
    total += np.log(np.exp(logits).sum()) - logits[list(columns).index(row)]
  return total / len(rows)


def token_reference(tokens, there, same, other):
  total = 0.0
  for image, mask in zip(tokens.astype(np.float64), there, strict=True):
    flat = [(c, normal(t)) for c in np.flatnonzero(mask) for t in image[c]]
    like, unlike = [], []
    for i, (c, x) in enumerate(flat):
      for j, (d, y) in enumerate(flat):
        if i != j:
          (like if c == d else unlike).append(x @ y)
    total += same * np.mean(like) + other * (np.mean(unlike) if unlike else 0.0)
  return total / len(tokens)


def test_the_losses_are_the_references():
  vectors, proxies = RNG.normal(size=(2, 6, 8)).astype(np.float32)
  present = np.array([1, 0, 1, 1, 0, 1], bool)
  have = channel_diversity(vectors, proxies, jnp.asarray(present), 0.07)
  assert float(have) == pytest.approx(channel_reference(vectors, proxies, present, 0.07), rel=1e-5)
  every = np.ones(6, bool)
  have = channel_diversity(vectors, proxies, jnp.asarray(present), 0.07, jnp.asarray(every))
  assert float(have) == pytest.approx(channel_reference(vectors, proxies, present, 0.07, every), rel=1e-5)
  tokens = RNG.normal(size=(3, 4, 5, 8)).astype(np.float32)
  there = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0]], bool)
  tokens[1, 0] = np.nan  # what is not there does not matter
  clean = np.where(there[..., None, None], tokens, 0)
  have = token_diversity(jnp.asarray(clean), jnp.asarray(there), 0.5, 4.0)
  assert float(have) == pytest.approx(token_reference(clean, there, 0.5, 4.0), rel=1e-4)


def test_gradients_are_the_references_slopes():
  present, there = np.array([1, 0, 1, 1], bool), np.array([[1, 1, 0], [1, 0, 1]], bool)
  vectors, proxies = RNG.normal(size=(2, 4, 8))
  tokens = RNG.normal(size=(2, 3, 4, 8))
  cases = ((lambda x: channel_diversity(x, jnp.asarray(proxies, jnp.float32), jnp.asarray(present), 0.3),
            lambda x: channel_reference(x, proxies, present, 0.3), vectors),
           (lambda x: token_diversity(x, jnp.asarray(there), 0.5, 4.0),
            lambda x: token_reference(x, there, 0.5, 4.0), tokens))
  for have, want, x in cases:
    grad = np.asarray(jax.grad(have)(jnp.asarray(x, jnp.float32)), np.float64)
    for _ in range(3):
      way = RNG.normal(size=x.shape)
      slope = (want(x + 1e-5 * way) - want(x - 1e-5 * way)) / 2e-5
      assert (grad * way).sum() == pytest.approx(slope, rel=1e-4, abs=1e-5)


def test_classes_are_all_channels_with_orthogonal_proxies():
  """The proxy of a channel that no image has is a class (cha_mae_vit), or none (DiChaViT)."""
  encoder = create_model('channel_vit_micro/4', (8, 8), 4, **TINY)
  mask = np.array([[1, 1, 0, 1], [0, 1, 0, 1]], bool)
  batch = {'image': jnp.zeros((2, 8, 8, 4)), 'channels': jnp.tile(jnp.arange(4), (2, 1)),
           'channel_mask': jnp.asarray(mask)}
  vectors = RNG.normal(size=(4, 16))
  shapes = nn.unbox(jax.eval_shape(encoder.init, jax.random.key(0), batch['image'], batch['channels']))['params']
  params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes) | {'channel_embed': jnp.asarray(vectors, jnp.float32)}
  for classes, every in (('present', None), ('all', np.ones(4, bool))):
    diversity = Diversity(channel_diversity=1.0, diversity_temperature=0.3, diversity_classes=classes)
    proxies = nn.unbox(jax.jit(diversity.init_proxies, static_argnums=0)(encoder, jax.random.key(1)))
    x = np.asarray(proxies['proxies'], np.float64)
    assert np.allclose(x @ x.T, np.eye(4), atol=1e-5) == (classes == 'all')
    have = jax.jit(diversity.diversity_losses, static_argnums=0)(encoder, {'encoder': params} | proxies, batch)
    assert float(have['channel_diversity']) == pytest.approx(channel_reference(vectors, x, mask.any(axis=0), 0.3, every), rel=1e-5)


def test_limits():
  """Equal tokens give same + other, orthogonal channels of equal tokens give same; channels on their proxies near 0."""
  one = np.ones((2, 3, 4, 8), np.float32)
  all_there = jnp.ones((2, 3), bool)
  assert float(token_diversity(one, all_there, 0.5, 2.0)) == pytest.approx(2.5, rel=1e-5)
  apart = np.broadcast_to(np.eye(8, dtype=np.float32)[:3, None], (2, 3, 4, 8))
  assert float(token_diversity(apart, all_there, 0.5, 2.0)) == pytest.approx(0.5, rel=1e-5)
  eye = np.eye(8, dtype=np.float32)
  assert float(channel_diversity(eye, eye, jnp.ones(8, bool), 0.07)) < 1e-10
  assert float(channel_diversity(eye, -eye, jnp.ones(8, bool), 0.07)) > 10


@pytest.mark.parametrize('embedding', ['table', 'hashed'])
def test_what_they_train(embedding):
  encoder = create_model('channel_vit_micro/8', 16, 3, ('a', 'b', 'c'), **TINY, channel_embedding=embedding)
  batch = {'image': jnp.asarray(RNG.normal(size=(4, 16, 16, 2)), jnp.float32),
           'channels': jnp.asarray([[0, 1], [1, 0]] * 2), 'label': jnp.asarray([0, 1, 0, 1])}
  plain, both = Supervised(encoder, 2), Supervised(encoder, 2, channel_diversity=0.1, token_diversity=0.2)
  variables = nn.unbox(both.init(jax.random.key(0), batch))
  assert variables['params']['proxies'].shape == (3, 16)
  key = jax.random.key(1)
  loss, (metrics, _) = both.loss(variables, batch, key, 0)
  base = plain.loss(variables, batch, key, 0)[0]
  assert float(loss) == pytest.approx(float(base + 0.1 * metrics['channel_diversity'] + 0.2 * metrics['token_diversity']),
                                      rel=1e-5)
  grads = jax.jit(jax.grad(lambda p: both.loss(variables | {'params': p}, batch, key, 0)[0]))(variables['params'])
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert not np.abs(grads['proxies'][2]).any() and np.abs(grads['proxies'][:2]).any()  # channel c is not shown
  if embedding == 'table':
    assert not np.abs(grads['encoder']['channel_embed'][2]).any()
  assert float(both.loss(variables, batch, key, 0, train=False)[0]) == pytest.approx(
      float(plain.loss(variables, batch, key, 0, train=False)[0]))


def test_bad_options():
  with pytest.raises(UserError, match='need one token a channel'):
    Supervised(create_model('vit_micro/8', 16, 3, **TINY), 2, token_diversity=0.1)
  with pytest.raises(UserError, match='must be at least 0'):
    Supervised(create_model('channel_vit_micro/8', 16, 3, **TINY), 2, channel_diversity=-1.0)
  with pytest.raises(UserError, match='all, present'):
    Supervised(create_model('channel_vit_micro/8', 16, 3, **TINY), 2, diversity_classes='some')
