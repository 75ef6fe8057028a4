"""What ChA-MAEViT and CA-MAE add to masked autoencoding, against NumPy in float64, and that nothing missing leaks in."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.models.decoders.heads import ClassHead
from jaxmed.models.decoders.mae import Decoder
from jaxmed.models.layers.transformer import Transformer
from jaxmed.objectives.losses.diversity import token_diversity
from jaxmed.objectives.losses.hybrid import classified, spectral_error
from jaxmed.objectives.masked.mae import MAE
from tests.objectives import compiled

RNG = np.random.default_rng(5)
TINY = dict(embed_dim=16, depth=1, num_heads=2, pos='learned')
MASK = np.array([[True, True, True], [True, False, True], [False, True, False], [True, True, False]])
EVERYTHING = dict(fourier=0.1, class_weight=0.2, class_temperature=5.0, num_classes=3, channel_diversity=0.3,
                  token_diversity=0.4, decoder_registers=True, decoder_shares=True, feature='cls')


def make(name='channel_vit_micro/4', registers=2, **options):
  encoder = create_model(name, (8, 12), 3, num_registers=registers, **TINY)
  objective = MAE(encoder, decoder_depth=1, decoder_heads=2, **options)
  batch = {'image': jnp.asarray(RNG.normal(size=(4, 8, 12, 3)), jnp.float32),
           'channels': jnp.tile(jnp.arange(3), (4, 1)), 'label': jnp.asarray([0, 2, -1, 1])}
  return objective, compiled.init(objective, batch), batch


def spectral_reference(predicted, target, patch, there=None):
  """By loops over tokens and channels."""
  channels = predicted.shape[-1] // int(np.prod(patch))
  out = np.zeros(predicted.shape[:2])
  for b, n in np.ndindex(out.shape):
    each = []
    for c in range(channels):
      if there is None or there[b, c]:
        x, y = (a[b, n].reshape(*patch, channels)[..., c] for a in (predicted, target))
        each.append(np.abs(np.abs(np.fft.fftn(x)) - np.abs(np.fft.fftn(y))).mean())
    out[b, n] = np.mean(each) if each else 0.0
  return out


@pytest.mark.parametrize('patch,channels', [((4, 4), 1), ((2, 4, 3), 1), ((4, 2), 3)])
def test_spectral_error_is_the_reference_and_so_is_its_slope(patch, channels):
  shape = (4, 5, int(np.prod(patch)) * channels)
  x, y, way = RNG.normal(size=(3, *shape))
  there = MASK if channels == 3 else None
  tiled = None if there is None else jnp.asarray(np.tile(there, (1, int(np.prod(patch))))[:, None])
  have = lambda x: spectral_error(x, jnp.asarray(y, jnp.float32), patch, tiled)
  np.testing.assert_allclose(have(jnp.asarray(x, jnp.float32)), spectral_reference(x, y, patch, there), rtol=1e-5)
  gradient = np.asarray(jax.grad(lambda x: have(x).sum())(jnp.asarray(x, jnp.float32)), np.float64)
  slope = (spectral_reference(x + 1e-6 * way, y, patch, there) - spectral_reference(x - 1e-6 * way, y, patch, there))
  assert (gradient * way).sum() == pytest.approx(slope.sum() / 2e-6, rel=1e-4, abs=1e-5)
  if there is not None:
    assert not np.abs(gradient[~np.repeat(np.tile(there, (1, 8))[:, None], 5, axis=1)]).any()


def test_spectral_error_of_equal_and_of_zero_tokens():
  x = jnp.zeros((1, 2, 16)).at[0, 0].set(1.0)
  value, gradient = jax.value_and_grad(lambda y: spectral_error(y, x, (4, 4)).sum())(x)
  assert float(value) == 0.0 and np.isfinite(gradient).all()
  np.testing.assert_allclose(spectral_error(x, jnp.zeros_like(x), (4, 4)), [[1.0, 0.0]])  # 16 at one of 16 frequencies


def test_token_diversity_of_shown_tokens():
  """First of a pair are the shown ones, second ones all that exist (cha_mae_vit, models/loss_func.py)."""
  tokens, shown = RNG.normal(size=(4, 3, 5, 8)), RNG.random((4, 3, 5)) < 0.5
  unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
  want = []
  for b in range(4):
    pairs = {True: [], False: []}
    for c, i, d, j in np.ndindex(3, 5, 3, 5):
      if MASK[b, c] and MASK[b, d] and shown[b, c, i] and (c, i) != (d, j):
        pairs[c == d].append(unit[b, c, i] @ unit[b, d, j])
    want.append(sum(factor * np.mean(pairs[same]) for same, factor in ((True, 0.5), (False, 4.0)) if pairs[same]))
  have = lambda shown: token_diversity(jnp.asarray(tokens, jnp.float32), jnp.asarray(MASK), 0.5, 4.0, shown)
  assert float(have(jnp.asarray(shown))) == pytest.approx(np.mean(want), rel=1e-4)
  assert float(have(jnp.ones((4, 3, 5), bool))) == pytest.approx(float(have(None)), rel=1e-6)


@pytest.mark.parametrize('kind', ['cross_entropy', 'proxy'])
def test_class_losses(kind):
  head = ClassHead(5, kind, 0.5)
  x, label = jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32), jnp.asarray([0, 4, -1, 2, 2, 1])
  params = nn.unbox(head.init(jax.random.key(0), x))
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params['params'])
  y = np.asarray(x, np.float64)
  if kind == 'proxy':
    y = y @ p['project']['kernel'] + p['project']['bias']
    y, q = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (y, p['proxies']))
    logits = -np.square(np.sqrt(1 / 0.5) * (y[:, None] - q[None])).sum(axis=-1)
    np.testing.assert_allclose(p['proxies'] @ p['proxies'].T, np.eye(5), atol=1e-6)
  else:
    from scipy.special import erf
    h = y @ p['fc1']['kernel'] + p['fc1']['bias']
    logits = (0.5 * h * (1 + erf(h / np.sqrt(2))) @ p['fc2']['kernel'] + p['fc2']['bias']) / 0.5
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  known = np.asarray(label) >= 0
  want = -log_p[np.arange(6), np.asarray(label)][known].mean()
  got = classified(head.apply(params, x), label)
  assert float(got['class_loss']) == pytest.approx(want, rel=1e-5)
  assert float(got['accuracy']) == pytest.approx((log_p.argmax(axis=1) == np.asarray(label))[known].mean())


def test_the_loss_is_the_sum_of_its_parts():
  objective, variables, batch = make(mask_channels='dynamic', **EVERYTHING)
  key = jax.random.key(1)
  whole = lambda p: objective.loss(variables | {'params': p}, batch, key, 0)
  (loss, (m, _)), grads = jax.jit(jax.value_and_grad(whole, has_aux=True))(variables['params'])
  m = {k: float(v) for k, v in m.items()}
  want = 0.8 * (0.9 * m['mae_loss'] + 0.1 * m['fourier_loss']) + 0.2 * m['class_loss'] + (
      0.3 * m['channel_diversity'] + 0.4 * m['token_diversity'])
  assert float(loss) == pytest.approx(want, rel=1e-5)
  for path, g in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(g).all(), path
  for part in ('head', 'proxies', 'decoder', 'encoder'):
    assert max(np.abs(g).max() for g in jax.tree.leaves(grads[part])) > 0, part
  held, (m, _) = compiled.loss(objective, variables, batch, key, train=False)
  assert float(held) == pytest.approx(float(0.8 * (0.9 * m['mae_loss'] + 0.1 * m['fourier_loss']) + 0.2 * m['class_loss']),
                                      rel=1e-5)
  assert 'token_diversity' not in m


def test_by_default_nothing_is_added():
  objective, variables, batch = make()
  loss, (metrics, _) = compiled.loss(objective, variables, batch, jax.random.key(1))
  assert set(metrics) == {'mae_loss', 'hidden_tokens'} and float(loss) == float(metrics['mae_loss'])
  assert set(variables['params']) == {'encoder', 'decoder'}


@pytest.mark.parametrize('options', [EVERYTHING, dict(EVERYTHING, decoder_shares=False, decoder_channels='separate')],
                         ids=['together', 'separate'])
def test_missing_channels_do_not_leak(options):
  objective, variables, batch = make(**options)
  batch = batch | {'channel_mask': jnp.asarray(MASK),  # an empty slot may have any name
                   'channels': jnp.asarray([[0, 1, 2], [0, 0, 2], [0, 1, 0], [0, 1, 1]])}
  look = lambda image: compiled.by_pixels(objective, variables, batch | {'image': image}, jax.random.key(2))
  noise = jnp.where(MASK[:, None, None, :], batch['image'], jnp.nan)
  value, gradient = look(batch['image'])
  assert float(look(noise)[0]) == float(value)
  gradient = np.moveaxis(np.asarray(gradient), -1, 1)
  assert (gradient[~MASK] == 0).all() and np.abs(gradient[MASK]).max(axis=(1, 2)).all()


def test_no_gradient_reaches_a_hidden_pixel():
  objective, variables, batch = make(**{k: v for k, v in EVERYTHING.items() if k != 'token_diversity'})
  key = jax.random.key(5)
  hidden = compiled.hidden(objective, variables['params'], batch, key)
  gradient = compiled.by_pixels(objective, variables, batch, key)[1]
  size = np.abs(np.asarray(gradient)).reshape(4, 2, 4, 3, 4, 3).max(axis=(2, 4))  # [B, *grid, C]
  size = np.moveaxis(size, -1, 1).reshape(4, -1)
  assert (size[np.asarray(hidden) > 0] == 0).all() and (size[np.asarray(hidden) == 0] > 0).all()


def test_memory_tokens_reach_the_decoder():
  """A decoder's prediction looks at the encoder's registers, as at its class token."""
  seen = {}
  for registers in (True, False):
    objective, variables, batch = make(decoder_registers=registers)
    args = objective._mask(jax.random.key(0), batch)
    latent = jnp.asarray(RNG.normal(size=(4, args.visible.shape[1], 16)), jnp.float32)

    def total(prefix, objective=objective, variables=variables, latent=latent, args=args, batch=batch):
      return jnp.square(objective.decoder.apply({'params': variables['params']['decoder']}, prefix, latent, args.visible,
                                                args.ids_restore, batch['channels'], None)).sum()

    features = type('Features', (), {'cls': jnp.ones((4, 16)), 'registers': 2 * jnp.ones((4, 2, 16))})
    prefix = objective._prefix(features)
    assert prefix.shape == (4, 3 if registers else 1, 16)
    seen[registers] = np.abs(jax.jit(jax.grad(total))(prefix)).max(axis=2)
  assert (seen[True] > 0).all() and (seen[False] > 0).all()


def test_a_decoder_that_shares_has_no_names_and_positions_of_its_own():
  objective, variables, batch = make(decoder_shares=True)
  assert 'channel_embed' not in variables['params']['decoder']
  table, names = objective._shared(variables['params']['encoder'], batch)
  encoder = variables['params']['encoder']
  np.testing.assert_array_equal(table, encoder['pos_embed'][3:])  # after a class token and two registers
  np.testing.assert_array_equal(names[0], encoder['channel_embed'])


def test_each_channel_has_blocks_of_its_own():
  """A decoder of one channel after the other, by the slices of the parameters."""
  decoder = Decoder((2, 3), 4, 5, 16, 2, 2, channels='separate')
  latent = jnp.asarray(RNG.normal(size=(2, 7, 16)), jnp.float32)
  order = jnp.asarray([RNG.permutation(18) for _ in range(2)])
  channels, visible = jnp.asarray([[3, 0, 1], [1, 4, 0]]), jnp.ones((2, 7), bool)
  valid = jnp.asarray([[True] * 18, [True] * 12 + [False] * 6])
  params = nn.unbox(jax.jit(decoder.init)(jax.random.key(0), None, latent, visible, order, channels, valid))['params']
  params = jax.tree.map(lambda x: x + 0.1 * jnp.asarray(RNG.normal(size=x.shape), jnp.float32), params)
  run = jax.jit(lambda p, *a: decoder.apply({'params': p}, None, *a))
  got = run(params, latent, visible, order, channels, valid)
  assert jax.tree.leaves(params['transformer'])[0].shape[:2] == (5, 2)

  seen = {}

  def keep(next_fun, args, kwargs, context):
    out = next_fun(*args, **kwargs)
    if context.method_name == '_look' or context.module.path == ('mlp',):
      seen[context.method_name] = out
    return out

  with nn.intercept_methods(keep):  # what goes into the blocks, [B, C, N, dim]
    decoder.apply({'params': params}, None, latent, visible, order, channels, valid)
  rows = (seen['_look'] + seen['__call__']).reshape(2, 3, 6, 16)
  dense = params['predict']
  blocks = jax.jit(lambda p, x: Transformer(2, 2, kernel_init='xavier_uniform').apply({'params': p}, x))
  for b, c in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]:
    name = int(channels[b, c])
    own = jax.tree.map(lambda x, name=name: x[name], params['transformer'])
    y = blocks(own, rows[b, c][None])
    np.testing.assert_allclose(got[b, 6 * c : 6 * c + 6], (y @ dense['kernel'] + dense['bias'])[0], atol=2e-5)
  first = [x[:1] for x in (latent, visible, order, channels, valid)]
  grads = jax.jit(jax.grad(lambda p: jnp.square(run(p, *first)).sum()))(params)['transformer']
  for g in jax.tree.leaves(grads):
    assert not np.abs(g[jnp.asarray([2, 4])]).any() and np.isfinite(g).all()
  assert all(np.abs(g[jnp.asarray([0, 1, 3])]).max() > 0 for g in jax.tree.leaves(grads)[:4])


@pytest.mark.parametrize('name', ['vit_micro/4', 'bag_micro/4', 'resnet_micro'])
def test_spectra_and_classes_with_other_encoders(name):
  more = {} if name == 'resnet_micro' else TINY
  size = (64, 64) if name == 'resnet_micro' else (8, 12)
  encoder = create_model(name, size, 3, **more)
  objective = MAE(encoder, decoder_depth=1, fourier=0.01, class_weight=0.01, num_classes=3)
  batch = {'image': jnp.asarray(RNG.normal(size=(4, *size, 3)), jnp.float32), 'label': jnp.asarray([0, 2, -1, 1]),
           'channels': jnp.tile(jnp.arange(3), (4, 1)), 'channel_mask': jnp.asarray(MASK)}
  loss, (metrics, _) = compiled.loss(objective, compiled.init(objective, batch), batch, jax.random.key(1))
  assert np.isfinite(float(loss)) and float(metrics['fourier_loss']) > 0 and float(metrics['class_loss']) > 0


@pytest.mark.parametrize('options,word', [
    (dict(fourier=1.5), 'fourier 1.5 is a share'), (dict(class_weight=-0.1), 'class_weight -0.1 is a share'),
    (dict(class_loss='proxies'), "'proxy'"), (dict(feature='max'), "'mean'"), (dict(class_temperature=0.0), 'above 0'),
    (dict(class_weight=0.1, num_classes=1), 'needs loader.label'), (dict(decoder_channels='apart'), "'separate'"),
    (dict(registers=0, decoder_registers=True), 'set encoder.num_registers'),
    (dict(decoder_shares=True, decoder_dim=8), 'or its width 16, not 8'),
    (dict(name='vit_micro/4', decoder_channels='separate'), 'a channel_vit or bag'),
    (dict(name='vit_micro/4', token_diversity=0.1), 'a channel_vit'),
    (dict(name='bag_micro/4', channel_diversity=0.1), 'looks at channel embeddings'),
    (dict(name='bag_micro/4', decoder_shares=True), 'needs a channel_vit whose')])
def test_bad_options_are_named(options, word):
  with pytest.raises(UserError, match=word):
    make(**options)
