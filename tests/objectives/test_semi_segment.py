"""Label autoencoder and mean teacher in float64 NumPy: losses whole, corruption, what no mask may change, a run of both."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from scipy import ndimage

import jaxmed
from jaxmed.augment import labels
from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.objectives.dense import semi_segment
from jaxmed.objectives.dense.label_autoencoder import LabelAutoencoder
from jaxmed.objectives.dense.semi_segment import SemiSegment
from jaxmed.objectives.networks import Clock
from jaxmed.train import loop
from jaxmed.train.build import rundir, towers
from tests.masks import tiles_with_masks
from tests.objectives.devices import draw

VALUES = (0, 2, 5)
RNG = np.random.default_rng(0)
ENCODER = create_model('vit_micro/4', (8, 8), 2, embed_dim=16, depth=1, num_heads=2)
AUTOENCODER = LabelAutoencoder(ENCODER, values=VALUES, code=6, depths=(1, 0))
SEMI = SemiSegment(ENCODER, decoder='linear', values=VALUES, noise=0.0, code_noise=0.0, gamma=2.0, consistency=3.0,
                   clock=Clock(80), towers=FrozenDict({'labels': AUTOENCODER}))
MASK = RNG.choice([-1, *VALUES], size=(3, 8, 8), p=[0.1, 0.4, 0.3, 0.2]).astype(np.int32)
MASK[1] = -1  # a record without a mask
ANNOTATED = np.array([[1, 1, 1], [1, 1, 1], [1, 0, 1]], bool)
BATCH = {'image': np.float32(RNG.normal(size=(3, 8, 8, 2))), 'channels': np.tile(np.arange(2, dtype=np.int32), (3, 1)),
         'mask': MASK, 'annotated': ANNOTATED}
BATCH = jax.tree.map(jnp.asarray, BATCH)
CLASSES = np.array([{0: 0, 2: 1, 5: 2, -1: -1}[v] for v in MASK.ravel()]).reshape(MASK.shape)
softmax = lambda x: np.exp(x - x.max(axis=-1, keepdims=True)) / np.exp(x - x.max(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True)
sigmoid = lambda x: 1 / (1 + np.exp(-x))


def started(objective):
  shapes = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0), BATCH))
  rng = np.random.default_rng(1)
  return jax.tree_util.tree_map_with_path(lambda path, x: draw(rng, path, x), shapes)


@pytest.fixture(scope='module')
def variables():
  return started(SEMI) | {'fixed': {'labels': started(AUTOENCODER)['params']}}


@pytest.mark.parametrize('radius', [1, 3, 4])
def test_extremes_are_grey_erosion_and_dilation_by_a_disk(radius):
  x = RNG.integers(0, 5, (2, 11, 9)).astype(np.int32)
  disk = np.add.outer(np.arange(-radius, radius + 1) ** 2, np.arange(-radius, radius + 1) ** 2) <= radius**2
  for sign, how in ((1, ndimage.grey_dilation), (-1, ndimage.grey_erosion)):
    got = labels.extreme(jnp.asarray(x), jnp.full(2, radius), 4, jnp.full(2, sign))
    np.testing.assert_array_equal(got, [how(one, footprint=disk, mode='reflect') for one in x])


@pytest.mark.parametrize('axis, reach', [(0, 3), (1, -4)])
def test_a_swap_is_that_of_numpy_by_indices(axis, reach):
  x, chosen = RNG.integers(0, 9, (1, 12, 10)).astype(np.int32), RNG.random((1, 12, 10)) < 0.2
  chosen &= np.expand_dims(np.arange(x.shape[1 + axis]) + abs(reach) < x.shape[1 + axis], (0, 2 - axis))
  want, at = x[0].copy(), np.nonzero(chosen[0])
  there = tuple(a + reach if i == axis else a for i, a in enumerate(at))  # below 0 from the end, as there
  mine, its = want[at], want[there]
  want[there], want[at] = mine, its
  got = labels.swap(jnp.asarray(x), jnp.asarray(chosen), jnp.asarray([reach]), axis)
  np.testing.assert_array_equal(got[0], want)


def test_corruption_keeps_the_classes_and_changes_slices_with_its_probability():
  x = np.zeros((2, 60, 24, 24), np.int32)
  x[:, :, 6:18, 6:18], x[:, :, 9:13, 9:13] = 1, 3
  same = lambda p: (np.asarray(jax.jit(labels.corrupted, static_argnums=2)(jax.random.key(0), x, p)) == x)
  assert same(0.0).all()
  whole = same(0.2).reshape(120, -1).all(axis=1).mean()  # neither change: 0.64, and an opening or so that does nothing
  assert 0.55 < whole < 0.85
  assert set(np.unique(np.where(same(1.0), x, -1))) <= {-1, 0, 1, 3}
  assert same(1.0).mean() > 0.5


def test_the_loss_of_the_autoencoder_whole(variables):
  params = variables['fixed']['labels']
  value, (metrics, _) = jax.jit(lambda p: AUTOENCODER.loss({'params': p, 'extra': {}}, BATCH, jax.random.key(0), 0, False))(params)
  logits = jax.jit(lambda p: AUTOENCODER.logits({'params': p}, BATCH)[0][0])(params)
  p, known = sigmoid(np.asarray(logits, np.float64)), CLASSES >= 0
  known, told = known[..., None] & np.ones(3, bool), ANNOTATED[:, None, None]
  merged = np.where((CLASSES == 1) & ~ANNOTATED[:, 1, None, None], 0, CLASSES)  # what nobody looked for is background
  t = (merged[..., None] == np.arange(3)).astype(float)
  error = np.square(p - t)[known & told].mean()
  both, below = ((x * (known & told)).sum(axis=(0, 1, 2)) for x in (p * t, p * p + t))
  dice = ((2 * both + 1e-5) / (below + 1e-5))[1:].mean()
  assert float(metrics['squared_error']) == pytest.approx(error, rel=1e-5)
  assert float(value) == pytest.approx(0.5 * (error + 1 - dice), rel=1e-5)


def test_the_loss_of_the_mean_teacher_whole_and_what_gets_no_gradient(variables):
  step = 41  # in the 20th of 40 jumps over 80 steps

  @jax.jit
  def computed(params, fixed, image):
    loss = lambda p, f, i: SEMI.loss({**variables, 'params': p, 'fixed': f}, BATCH | {'image': i}, jax.random.key(0), step, False)
    (value, (metrics, _)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, fixed, image)
    plain = dataclasses.replace(SEMI, gamma=0.0).loss(variables, BATCH, jax.random.key(0), step, False)[0]
    alone = dataclasses.replace(SEMI, towers=FrozenDict()).loss(variables | {'fixed': {}}, BATCH, jax.random.key(0), step, False)[0]
    masks = lambda i: dataclasses.replace(SEMI, consistency=0.0).loss(variables, BATCH | {'image': i}, jax.random.key(0), step, False)[0]
    student, teacher = (SEMI.logits({'params': variables[k]}, BATCH)[0][0] for k in ('params', 'target'))
    made = AUTOENCODER.reconstruct(fixed['labels'], teacher.argmax(axis=-1))[0]
    return value, metrics, grads, plain, alone, jax.grad(masks)(image), student, teacher, made

  value, metrics, (grads, read), plain, alone, of_image, *logits = computed(variables['params'], variables['fixed'], BATCH['image'])
  student, teacher, made = (np.asarray(x, np.float64) for x in logits)
  s, t, r = softmax(student), softmax(teacher), sigmoid(made)
  u = np.square(r - t)
  consistency = lambda w: (w * np.square(s - t)).sum() / (2 * w.sum())
  weight = 3.0 * np.exp(-5 * (1 - 20 / 40) ** 2)
  supervised = []
  for gamma in (2.0, 0.0):
    got = value if gamma else plain
    supervised.append(float(got) - weight * consistency(np.exp(-gamma * u)))
  p, cases = s.copy(), [0, 2]
  p[2, ..., 0], p[2, ..., 1] = p[2, ..., 0] + p[2, ..., 1], 0  # not annotated: part of the background
  c = np.where((CLASSES == 1) & ~ANNOTATED[:, 1, None, None], 0, CLASSES)
  known = c >= 0
  t1 = (c[..., None] == np.arange(3)) & known[..., None]
  entropy = -np.log(p[t1]).mean()
  terms = []
  for k in (1, 2):
    rows = [i for i in cases if ANNOTATED[i, k]]
    q, one = p[rows][..., k] * known[rows], t1[rows][..., k]
    terms.append((2 * (q * one).sum() + 1e-5) / ((q * q).sum() + one.sum() + 1e-5))
  want = 0.5 * (entropy - np.mean(terms))
  assert supervised == pytest.approx([want, want], rel=1e-5)
  assert float(alone) == pytest.approx(float(plain), rel=1e-6)  # weights of 1 are the plain mean teacher
  assert float(metrics['uncertainty']) == pytest.approx(u.mean(), rel=1e-5)
  assert not any(np.abs(x).max() for x in jax.tree.leaves(read))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
  assert not np.abs(of_image[1]).max() and np.abs(of_image[0]).max() > 0


def test_schedules():
  assert [float(SEMI.momentum(k)) for k in (0, 1, 3, 99, 1000)] == pytest.approx([0, 0.5, 0.75, 0.99, 0.99])
  got = [float(semi_segment.rise(jnp.asarray(k), 8000)) for k in (0, 199, 200, 4000, 7999, 8000, 9000)]
  e = np.array([0, 0, 1, 20, 39, 40, 40])
  np.testing.assert_allclose(got, np.exp(-5 * (1 - e / 40) ** 2), rtol=1e-5)


def test_noise_is_cut_at_two_deviations_and_a_tower_is_plain_data():
  noise = np.asarray(semi_segment.clipped(jax.random.key(0), (4000,), 0.1))
  assert np.abs(noise).max() == pytest.approx(0.2) and noise.std() == pytest.approx(0.0958, rel=0.05)
  told = json.loads(json.dumps(towers.described(AUTOENCODER)))
  assert towers.rebuilt(told) == AUTOENCODER


@pytest.mark.parametrize('change, words', [
    ({'values': (0, 2)}, r'towers.labels.init is a label autoencoder of values \(0, 2, 5\): expected \(0, 2\)'),
    ({'rampup': 0.0}, r'rampup 0.0 in \(0, 1\]'), ({'gamma': -1.0}, 'objective.gamma -1.0')])
def test_what_is_refused(change, words):
  with pytest.raises(UserError, match=words):
    dataclasses.replace(SEMI, **change)
  with pytest.raises(UserError, match='objective.corruption 2'):
    dataclasses.replace(AUTOENCODER, corruption=2)


def test_runs_of_both(tiles, tmp_path):
  corpus = tiles_with_masks(tiles, tmp_path)
  base = {'data': str(corpus), 'model': 'vit_micro/8', 'encoder': {'embed_dim': 16, 'depth': 1, 'num_heads': 2},
          'image_size': 16, 'batch_size': 8, 'steps': 2, 'checkpoint_every': 2, 'eval_every': 2, 'evaluators': 'loss,dice'}
  loop.train(base | {'method': 'label_autoencoder', 'objective': {'code': 8, 'depths': (0,)}}, tmp_path / 'labels', quiet=True)
  user = base | {'method': 'semi_segment', 'objective': {'decoder': 'linear'},
                 'loader': {'balance': 'has_mask', 'alpha': 0.0}, 'towers': {'labels': {'init': str(tmp_path / 'labels')}}}
  loop.train(user, tmp_path / 'run', quiet=True)
  rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  assert all(np.isfinite(row['loss']) and row['uncertainty'] > 0 and row['known_pixels'] == 0.5 for row in rows if 'loss' in row)
  trainer, config, spec, state = rundir.load_state(tmp_path / 'run')
  assert set(state.params) == set(state.target) == {'encoder', 'decoder'} and spec.rows == 24  # six of them without a mask
  assert config.towers.labels.sha256 == towers.digest_of(rundir.load_tower(tmp_path / 'labels', 'label_autoencoder').params)
  assert jaxmed.load_segmenter(tmp_path / 'run').predict(np.zeros((16, 16, 3), np.uint8)).shape == (16, 16)
  with pytest.raises(UserError, match='is a run of method label_autoencoder, which has no classes'):
    jaxmed.load_segmenter(tmp_path / 'labels')
  with pytest.raises(UserError, match='is a run of method semi_segment: expected one of method label_autoencoder'):
    loop.train(user | {'towers': {'labels': {'init': str(tmp_path / 'run')}}}, tmp_path / 'other', quiet=True)
