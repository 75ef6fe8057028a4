"""SimMIM, I-JEPA and data2vec 2.0: losses against NumPy in float64, masks, and what must carry no gradient."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed import config
from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.models.decoders.predictor import GroupedConv
from jaxmed.objectives.masked.data2vec import Data2Vec, average_of_layers, inverse_blocks
from jaxmed.objectives.masked.ijepa import IJEPA, block_sides, cut_to_shortest, largest_block, place_blocks
from jaxmed.objectives.masked.simmim import SimMIM
from jaxmed.objectives.networks import Clock
from tests.objectives import compiled

RNG = np.random.default_rng(3)
KEY = jax.random.key(5)
SMALL = dict(embed_dim=16, depth=2, num_heads=2)
MASK = jnp.array([[True, True, True], [True, False, True], [False, True, False], [True, True, False], [True] * 3])
OPTIONS = {
    SimMIM: dict(mask_size=8), IJEPA: dict(predictor_dim=16, predictor_depth=1, predictor_heads=2),
    Data2Vec: dict(masks=2, decoder_depth=2, decoder_groups=4)}


def make(method, name='channel_vit_micro/4', size=(16, 24), channels=3, mask=None, **options):
  wants = {k: v for k, v in method.DEFAULTS['encoder'].items() if k != 'masking'}
  encoder = create_model(name, size, channels, **SMALL, **wants)
  objective = method(encoder, **OPTIONS[method] | options)
  batch = {'image': jnp.asarray(RNG.normal(size=(5, *size, channels)), jnp.float32),
           'channels': jnp.tile(jnp.arange(channels), (5, 1))}
  batch |= {} if mask is None else {'channel_mask': mask}
  variables = compiled.init(objective, batch)
  moved = jax.tree.map(lambda x: x + 0.05 * jnp.asarray(RNG.normal(size=x.shape), x.dtype), variables['target'])
  return objective, variables | {'target': moved}, batch


@functools.partial(jax.jit, static_argnums=0)
def features(encoder, params, *inputs):
  return encoder.apply({'params': params}, *inputs)


@functools.partial(jax.jit, static_argnums=0)
def every_layer(encoder, params, *inputs):
  return encoder.apply({'params': params}, *inputs, capture_intermediates=lambda m, _: True)[1]


@functools.partial(jax.jit, static_argnums=0)
def target_of(objective, variables, batch):
  return objective._target(variables, batch)


def pixels(image, patch, per_channel):
  b, h, w, c = image.shape
  x = np.asarray(image, np.float64).reshape(b, h // patch, patch, w // patch, patch, c)
  x = x.transpose(0, 5, 1, 3, 2, 4) if per_channel else x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, -1, patch * patch * (1 if per_channel else c))


@pytest.mark.parametrize('name', ['vit_micro/4', 'channel_vit_micro/4'])
@pytest.mark.parametrize('mask', [None, MASK], ids=['whole', 'missing'])
def test_simmim_loss(name, mask):
  objective, variables, batch = make(SimMIM, name, mask=mask)
  (loss, _), (predicted, hidden, _) = compiled.both(objective, variables, variables['params'], batch, KEY)
  per_channel = 'channel' in name
  want = np.abs(np.asarray(predicted, np.float64) - pixels(batch['image'], 4, per_channel))
  there = np.ones((5, 3), bool) if mask is None else np.asarray(mask)
  there = np.repeat(there, 24, axis=1)[..., None] if per_channel else np.tile(there, (1, 16))[:, None]
  counts = np.broadcast_to(np.asarray(hidden)[..., None] & there, want.shape)
  assert float(loss) == pytest.approx(want[counts].mean(), rel=1e-5)
  # Squares of the side of 1 patch (a third of 4): ceil(0.6 * 24) of them a channel.
  np.testing.assert_array_equal(np.asarray(hidden).sum(axis=1), 15 * (3 if per_channel else 1))


def test_simmim_hides_whole_squares():
  objective, _, batch = make(SimMIM, 'vit_micro/4', size=(32, 24))
  hidden = np.asarray(objective._mask(KEY, batch)).reshape(5, 8, 6)
  squares = hidden.reshape(5, 4, 2, 3, 2)
  assert (squares.all(axis=(2, 4)) == squares.any(axis=(2, 4))).all()
  np.testing.assert_array_equal(squares.all(axis=(2, 4)).sum(axis=(1, 2)), 8)  # ceil(0.6 * 12)
  assert len({h.tobytes() for h in hidden}) > 2


def test_simmim_hidden_pixels_are_not_looked_at():
  objective, variables, batch = make(SimMIM)

  @jax.jit
  def looked(params, image):
    def seen(image):
      predicted, hidden, _ = objective._predict(params, dict(batch, image=image), KEY, True)
      return predicted.sum(), hidden
    return jax.grad(seen, has_aux=True)(image)

  gradient, hidden = looked(variables['params'], batch['image'])
  gradient, hidden = np.abs(pixels(gradient, 4, True)).max(axis=-1), np.asarray(hidden)
  assert (gradient[hidden] == 0).all() and (gradient[~hidden] > 0).all()


@pytest.mark.parametrize('mask', [None, MASK], ids=['whole', 'missing'])
def test_ijepa_loss(mask):
  objective, variables, batch = make(IJEPA, mask=mask)
  (loss, _), (predicted, target, asked, _) = compiled.both(objective, variables, variables, batch, KEY)
  keys = jax.random.split(KEY)
  _, _, wanted, _ = objective._blocks(keys[0], batch)
  whole = features(objective.encoder, variables['target']['encoder'], batch['image'], batch['channels'], mask)
  x = np.asarray(whole.patches, np.float64)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  total, count = 0.0, 0
  for b, m, t in np.argwhere(np.asarray(asked)):
    off = np.abs(np.asarray(predicted, np.float64)[b, m, t] - x[b, wanted[b, m, t]])
    total, count = total + np.where(off < 1, 0.5 * off**2, off - 0.5).mean(), count + 1
  assert float(loss) == pytest.approx(total / count, rel=1e-4)
  assert count > 20


def test_ijepa_context_sees_no_target_and_blocks_are_blocks():
  objective, _, batch = make(IJEPA, mask=MASK)
  shown, visible, wanted, asked = map(np.asarray, objective._blocks(KEY, batch))
  sizes = set()
  for b in range(5):
    context = set(shown[b][visible[b]])
    exist = np.repeat(np.asarray(MASK)[b], 24)
    assert context and exist[list(context)].all()
    for m in range(4):
      target = wanted[b, m][asked[b, m]]
      assert len(set(target)) == len(target) and not context & set(target) and exist[target].all()
      cells = np.zeros(24, bool)
      cells[target % 24] = True
      y, x = np.nonzero(cells.reshape(4, 6))
      height, width = np.ptp(y) + 1, np.ptp(x) + 1
      assert height * width == cells.sum()  # a full rectangle
      assert len(target) == cells.sum() * np.asarray(MASK)[b].sum()  # in every channel that is there
      sizes.add((height, width))
  assert len(sizes) == 1  # one size a batch


@pytest.mark.parametrize('grid', [(14, 14), (4, 6, 5)])
def test_blocks_have_the_asked_sizes_and_uniform_places(grid):
  place = jax.jit(lambda k: place_blocks(jax.random.fold_in(k, 0), jax.random.fold_in(k, 1), (64, 4), grid, (0.15, 0.2),
                                         (0.75, 1.5), True))
  shares = [np.asarray(place(jax.random.key(i)).sum(axis=-1)) for i in range(40)]
  assert all(len(np.unique(s)) == 1 for s in shares)
  most = largest_block(grid, (0.15, 0.2), (0.75, 1.5))
  assert max(s.max() for s in shares) <= most
  mean = np.mean(shares) / np.prod(grid)
  assert 0.13 < mean < 0.22
  if grid == (14, 14):  # against the official rule, written out
    draws = np.linspace(0, 1, 101)
    for u, h, w in zip(draws, *block_sides(draws, grid, (0.15, 0.2), (0.75, 1.5), True, np)):
      keep, aspect = int(196 * (0.15 + u * 0.05)), 0.75 + u * 0.75
      assert (h, w) == (round(np.sqrt(keep * aspect)), round(np.sqrt(keep / aspect)))


def test_ijepa_contexts_by_the_published_rule():
  """Means of 400 batches of 128 by src/masks/multiblock.py on a grid of 16 x 16: 0.426 and 0.262 after the cut."""
  grid = (16, 16)

  @jax.jit
  def draw(key):
    k = jax.random.split(key, 4)
    targets = place_blocks(k[0], k[1], (128, 4), grid, (0.15, 0.2), (0.75, 1.5), True, True)
    context = place_blocks(k[2], k[3], (128, 1), grid, (0.85, 1.0), (1.0, 1.0), True, True)[:, 0] & ~targets.any(axis=1)
    return targets, context, cut_to_shortest(context, 128, 103)

  shares, cuts = [], []
  for i in range(60):
    targets, context, cut = (np.asarray(x) for x in draw(jax.random.key(i)))
    at = lambda x: x.reshape(-1, 16, 16)
    assert not at(targets)[:, -1].any() and not at(targets)[:, :, -1].any() and not at(context)[:, -1].any()
    assert at(context)[:, 0].any()
    least = min(int(context.sum(axis=1).min()), 103)
    for whole, part in zip(context, cut, strict=True):
      np.testing.assert_array_equal(np.nonzero(part)[0], np.nonzero(whole)[0][:least])
    shares.append(context.mean())
    cuts.append(cut.mean())
  assert np.mean(shares) == pytest.approx(0.426, abs=0.015) and np.mean(cuts) == pytest.approx(0.262, abs=0.015)


def test_ijepa_cuts_within_groups():
  context = jnp.asarray([[1, 1, 1, 0], [0, 0, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]], bool)
  want = [[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 0]]
  np.testing.assert_array_equal(cut_to_shortest(context, 2, 2), want)
  with pytest.raises(UserError, match='objective.context_group 3 does not divide the batch of 4'):
    cut_to_shortest(context, 3, 4)


def test_data2vec_loss():
  objective, variables, batch = make(Data2Vec, mask=MASK)
  (loss, (metrics, _)), (predicted, hidden, cls, _) = compiled.both(objective, variables, variables['params'], batch, KEY)
  target, exists = map(np.asarray, target_of(objective, variables, batch))
  predicted, cls = np.asarray(predicted, np.float64), np.asarray(cls, np.float64)
  errors = [((predicted[r, n] - target[r // 2, n]) ** 2).sum() / 4 for r, n in np.argwhere(np.asarray(hidden))
            if exists[r // 2, n]]
  assert float(metrics['data2vec_loss']) == pytest.approx(np.mean(errors), rel=1e-5)
  middle = np.stack([target[b][exists[b]].mean(axis=0) for b in range(5)])
  off = np.mean([((cls[r] - middle[r // 2]) ** 2).sum() / 4 for r in range(10)])
  assert float(loss) == pytest.approx(np.mean(errors) + 2.56 * off, rel=1e-5)


@pytest.mark.parametrize('top', [1, 2])
def test_data2vec_targets_are_the_mlps_of_the_last_blocks(top):
  """Block by block from its parts, then the norms in float64."""
  objective, variables, batch = make(Data2Vec, top_blocks=top)
  target, _ = target_of(objective, variables, batch)
  state = every_layer(objective.encoder, variables['target']['encoder'], batch['image'], batch['channels'])
  layers = np.asarray(state['intermediates']['transformer']['blocks']['mlp']['__call__'][0], np.float64)[:, :, 1:]
  want = np.mean([(x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) for x in layers[-top:]],
                 axis=0)
  want = (want - want.mean(-1, keepdims=True)) / np.sqrt(want.var(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(target, want, atol=2e-4)


def test_missing_tokens_do_not_count_in_the_average():
  layers, exists = RNG.normal(size=(2, 3, 6, 4)), np.array([[1, 1, 1, 0, 1, 0], [1] * 6, [0, 1, 1, 1, 1, 1]], bool)
  layers[:, ~exists] = np.nan
  have = np.asarray(average_of_layers(jnp.asarray(layers, jnp.float32), jnp.asarray(exists)))
  for b in range(3):
    x = layers[:, b][:, exists[b]]
    x = ((x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)).mean(0)
    np.testing.assert_allclose(have[b][exists[b]], (x - x.mean(-1, keepdims=True)) / np.sqrt(
        x.var(-1, keepdims=True) + 1e-5), atol=1e-5)


def test_data2vec_order_puts_every_token_at_its_place():
  objective, _, _ = make(Data2Vec)
  size = tuple(n * p for n, p in zip((4, 6), objective.encoder.patch_size, strict=True))
  batch = {'image': np.zeros((4, *size, 3)), 'channel_mask': np.ones((4, 3), bool)}
  order, shown, visible = map(np.asarray, objective._mask(KEY, batch))
  kept = shown.shape[1]
  assert kept == 3 * (24 - int(24 * 0.8)) and visible.all()
  for r in range(4):
    assert sorted(order[r]) == list(range(72))
    for k in range(kept):
      assert order[r, shown[r, k]] == k
    places = shown[r].reshape(3, -1) % 24
    assert (places == places[0]).all() and (shown[r].reshape(3, -1) // 24 == np.arange(3)[:, None]).all()
  small = batch | {'sizes': np.tile(np.array(objective.encoder.patch_size) * (2, 3), (4, 1))}
  order, shown, visible = map(np.asarray, objective._mask(KEY, small))
  assert visible.sum(axis=1).tolist() == [3 * (6 - int(6 * 0.8))] * 4  # of six cells
  for r in range(4):
    assert sorted(order[r]) == list(range(72))
    cells = shown[r][visible[r]] % 24
    assert (cells // 6 < 2).all() and (cells % 6 < 3).all()


def test_data2vec_of_the_recipe_keeps_39_of_196():
  """As many as fairseq, data/data_utils.py:compute_block_mask_2d: int(196 * (1 - 0.8)), in floating point 39."""
  ratio = config.load_file('experiments/data2vec.py')['objective']['mask_ratio']
  objective = Data2Vec(create_model('vit_micro/2', (28, 28), 1), mask_ratio=ratio)
  batch = {'image': np.zeros((1, 28, 28, 1)), 'channels': np.zeros((1, 1), int)}
  shown = jax.eval_shape(lambda: objective._mask(KEY, batch)[1])
  assert shown.shape == (1, int(196 * (1 - 0.8))) == (1, 39)


def test_inverse_blocks_keep_cells_of_a_few_blocks():
  """Of 14 x 14 cells a fifth is kept, next to one another more often than at random."""
  score = inverse_blocks(KEY, 200, (14, 14), 40, 3, 0.07)
  keep = np.asarray(jnp.argsort(jnp.argsort(score, axis=1), axis=1) < 40).reshape(-1, 14, 14)
  assert (keep.sum(axis=(1, 2)) == 40).all()
  pairs = (keep[:, 1:] & keep[:, :-1]).sum() / keep[:, 1:].sum()
  assert pairs > 0.4  # 0.2 if independent
  inside = keep.mean(axis=0)[2:-2, 2:-2]
  assert inside.min() > 0.15 and inside.max() < 0.33  # 0.2 on average; fewer blocks reach the border


@pytest.mark.parametrize('method', [IJEPA, Data2Vec])
def test_the_target_moves_by_its_average_alone(method):
  objective, variables, batch = make(method, clock=Clock(100, 10.0))
  loss = lambda v: objective.loss(v, batch, KEY, 0)[0]
  grads = jax.jit(jax.grad(loss, allow_int=True))({k: variables[k] for k in ('params', 'target', 'extra')})
  assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads['target'])) == 0
  assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads['params']['encoder']['transformer']))
  momentum = [float(objective.momentum(jnp.asarray(s))) for s in (0, 100)]
  assert momentum == pytest.approx([objective.momentum_start, objective.momentum_end])
  assert jax.tree.structure(objective.encoder_params(variables)) == jax.tree.structure(variables['params']['encoder'])


@pytest.mark.parametrize('method', [SimMIM, IJEPA, Data2Vec])
def test_what_missing_channels_hold_does_not_matter(method):
  objective, variables, batch = make(method, mask=MASK)
  given = variables if method is IJEPA else variables['params']
  loss = lambda image: compiled.both(objective, variables, given, dict(batch, image=image), KEY)[0][0]
  other = jnp.where(MASK[:, None, None], batch['image'], 7.0)
  assert float(loss(other)) == pytest.approx(float(loss(batch['image'])), rel=1e-6)


@pytest.mark.parametrize('method, size', [(SimMIM, (8, 8, 8)), (IJEPA, (8, 8, 8)), (Data2Vec, (8, 8, 8))])
def test_volumes(method, size):
  objective, variables, batch = make(method, 'vit_micro/4', size=size, channels=1)
  loss = compiled.loss(objective, variables, batch, KEY)[0]
  assert np.isfinite(loss) and float(loss) > 0


@pytest.mark.parametrize('method, options, word', [
    (SimMIM, dict(mask_ratio=1.0), 'mask_ratio'), (SimMIM, dict(mask_size=0), 'mask_size'),
    (IJEPA, dict(target_scale=(0.5, 0.1)), 'target_scale'), (IJEPA, dict(predictor_heads=5), 'predictor_heads'),
    (Data2Vec, dict(masks=0), 'masks'), (Data2Vec, dict(decoder_groups=3), 'decoder_groups')])
def test_bad_options(method, options, word):
  with pytest.raises(UserError, match=word):
    make(method, **options)


@pytest.mark.parametrize('grid', [(4, 5), (3, 4, 2)])
def test_a_grouped_convolution_is_flaxs(grid):
  x = jnp.asarray(RNG.normal(size=(2, *grid, 12)), jnp.float32)
  ours = GroupedConv(8, 3, 4)
  params = jax.tree.map(lambda p: p + 0.3, nn.unbox(ours.init(KEY, x)['params']))
  kernel = params['kernel'].reshape(4, *[3] * len(grid), 3, 2)  # [G, *taps, D / G, out / G]
  kernel = jnp.moveaxis(kernel, 0, -2).reshape(*[3] * len(grid), 3, 8)
  want = nn.Conv(8, (3,) * len(grid), feature_group_count=4).apply({'params': {'kernel': kernel, 'bias': params['bias']}}, x)
  np.testing.assert_allclose(ours.apply({'params': params}, x), want, atol=1e-5)
