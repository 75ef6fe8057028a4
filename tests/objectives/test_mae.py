"""Masked autoencoding: the loss against NumPy in float64, what must carry no gradient, masks by channel."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmed.errors import UserError
from jaxmed.models import create_model
from jaxmed.objectives.masked.mae import MAE
from tests.objectives import compiled

RNG = np.random.default_rng(3)
TINY = dict(embed_dim=16, depth=1, num_heads=2, pos='sincos')
CASES = {  # name, image size, channels
    'patch 2D': ('vit_micro/4', (12, 16), 3), 'patch 3D': ('vit_micro/2x4x4', (4, 8, 8), 2),
    'channel 2D': ('channel_vit_micro/4', (12, 16), 3), 'channel video': ('channel_vit_micro/2x4x4', (4, 8, 8), 2),
}


def make(case, **options):
  name, size, channels = CASES[case]
  encoder = create_model(name, size, channels, **TINY)
  objective = MAE(encoder, decoder_dim=16, decoder_depth=1, decoder_heads=2, **options)
  batch = {'image': jnp.asarray(RNG.normal(size=(5, *size, channels)), jnp.float32),
           'channels': jnp.tile(jnp.arange(channels), (5, 1))}
  return objective, compiled.init(objective, batch), batch


def hidden_of(objective, variables, batch, key):
  return np.asarray(compiled.hidden(objective, variables['params'], batch, key))


def reference_patches(image, patch, per_channel):
  """Pixels of each token [B, N, P] by plain loops."""
  image = np.asarray(image, np.float64)
  grid = [n // p for n, p in zip(image.shape[1:-1], patch)]
  cut = []
  for cell in np.ndindex(*grid):
    window = tuple(slice(i * p, (i + 1) * p) for i, p in zip(cell, patch))
    cut.append(image[(slice(None), *window)])
  x = np.stack(cut, axis=1)  # [B, N, *patch, C]
  if per_channel:
    x = np.moveaxis(x, -1, 1)  # [B, C, N, *patch]
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1)
  return x.reshape(*x.shape[:2], -1)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('norm_pixels', [True, False])
def test_loss_is_the_numpy_reference(case, norm_pixels):
  objective, variables, batch = make(case, norm_pixels=norm_pixels)
  key = jax.random.key(5)
  (loss, (metrics, _)), (predicted, hidden, _) = compiled.both(objective, variables, variables['params'], batch, key)
  target = reference_patches(batch['image'], objective.encoder.patch_size, objective.encoder.per_channel)
  if norm_pixels:
    target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
  error = ((np.asarray(predicted, np.float64) - target) ** 2).mean(-1)
  hidden = np.asarray(hidden, np.float64)
  want = (error * hidden).sum() / hidden.sum()
  assert abs(float(loss) - want) < 1e-5 * want
  count = hidden.shape[1]
  np.testing.assert_array_equal(hidden.sum(axis=1), count - int(count * 0.25))
  assert float(metrics['hidden_tokens']) == count - int(count * 0.25)
  assert len({tuple(row) for row in hidden}) >= 3  # each sample draws its own mask


@pytest.mark.parametrize('case', CASES)
def test_no_gradient_reaches_a_hidden_pixel(case):
  objective, variables, batch = make(case)
  key = jax.random.key(5)
  hidden = hidden_of(objective, variables, batch, key)
  gradient = compiled.by_pixels(objective, variables, batch, key)[1]
  encoder = objective.encoder
  size = np.abs(reference_patches(gradient, encoder.patch_size, encoder.per_channel)).max(axis=-1)
  assert (size[np.asarray(hidden) > 0] == 0).all()
  assert (size[np.asarray(hidden) == 0] > 0).all()


def test_shared_masks_hide_the_same_places_in_every_channel():
  objective, variables, batch = make('channel 2D', mask_channels='shared')
  hidden = hidden_of(objective, variables, batch, jax.random.key(1))
  hidden = np.asarray(hidden).reshape(5, 3, -1)
  np.testing.assert_array_equal(hidden[:, 0], hidden[:, 1])
  np.testing.assert_array_equal(hidden[:, 0], hidden[:, 2])
  np.testing.assert_array_equal(hidden.sum(axis=(1, 2)), 3 * (12 - 3))
  objective, variables, batch = make('channel 2D')
  hidden = hidden_of(objective, variables, batch, jax.random.key(1)).reshape(5, 3, -1)
  assert not np.array_equal(hidden[:, 0], hidden[:, 1])


@pytest.mark.parametrize('mask_channels', ['independent', 'shared'])
def test_missing_channels_are_neither_shown_nor_reconstructed(mask_channels):
  objective, variables, batch = make('channel 2D', mask_channels=mask_channels)
  mask = jnp.array([[True, True, True], [True, False, True], [False, True, False], [True, True, False], [True] * 3])
  batch = dict(batch, channel_mask=mask)
  key = jax.random.key(2)
  hidden = hidden_of(objective, variables, batch, key)
  hidden = np.asarray(hidden).reshape(5, 3, 12)
  assert (hidden[~np.asarray(mask)] == 0).all()
  np.testing.assert_array_equal(hidden.sum(axis=(1, 2)), mask.sum(axis=1) * 9)
  noise = jnp.where(mask[:, None, None, :], batch['image'], jnp.nan)
  value, gradient = compiled.by_pixels(objective, variables, batch, key)
  assert float(compiled.by_pixels(objective, variables, dict(batch, image=noise), key)[0]) == float(value)
  gradient = np.asarray(gradient)
  assert (np.moveaxis(gradient, -1, 1)[~np.asarray(mask)] == 0).all()


def test_the_loss_falls_when_it_is_minimised():
  objective, variables, batch = make('channel 2D')
  adam = optax.adam(1e-2)

  @jax.jit
  def step(params, moments):
    loss, grads = jax.value_and_grad(
        lambda p: objective.loss({'params': p, 'extra': {}}, batch, jax.random.key(0), 0)[0])(params)
    updates, moments = adam.update(grads, moments)
    return optax.apply_updates(params, updates), moments, loss

  params, moments = variables['params'], adam.init(variables['params'])
  losses = []
  for _ in range(60):
    params, moments, loss = step(params, moments)
    losses.append(float(loss))
  assert losses[-1] < 0.85 * losses[0]


def test_pictures_keep_what_was_seen_and_undo_the_patch_normalisation():
  objective, variables, batch = make('patch 2D')
  original, masked, filled = map(np.asarray, objective.pictures(variables, batch, jax.random.key(0))['reconstructions'])
  seen = ~np.isnan(masked)
  assert 0.2 < seen.mean() < 0.3
  np.testing.assert_array_equal(filled[seen], original[seen])
  patches = reference_patches(filled, objective.encoder.patch_size, False)
  want = reference_patches(original, objective.encoder.patch_size, False)
  assert np.isfinite(patches).all() and np.abs(patches - want).max() < 20


@pytest.mark.parametrize('options,word', [
    (dict(mask_ratio=1.0), 'mask_ratio'), (dict(mask_channels='share'), "'shared'"),
    (dict(mask_ratio=0.999), 'hides all')])
def test_bad_options_are_named(options, word):
  with pytest.raises(UserError, match=word):
    make('patch 2D', **options)


def test_decoder_heads_must_divide():
  with pytest.raises(UserError, match='decoder_heads'):
    MAE(create_model('vit_micro/4', 8, 1), decoder_dim=10, decoder_heads=4)


def test_channels_left_out_by_sampling_can_be_predicted_from_the_others():
  objective, variables, batch = make('channel 2D', unsampled='predict')
  there = jnp.array([[True] * 3, [True] * 3, [True, True, False], [True] * 3, [False, True, True]])
  shown = jnp.array([[True, False, False], [True] * 3, [False, True, False], [True, True, False], [False, True, False]])
  batch = dict(batch, channel_mask=shown, channel_there=there)
  key = jax.random.key(4)
  hidden = hidden_of(objective, variables, batch, key).reshape(5, 3, 12)
  assert (hidden[~np.asarray(there)] == 0).all()
  assert (hidden[np.asarray(there & ~shown)] == 1).all()  # all of a channel that is there and was not shown
  np.testing.assert_array_equal(hidden.sum(axis=(1, 2)), there.sum(axis=1) * 12 - shown.sum(axis=1) * 3)
  gradient = np.moveaxis(np.asarray(compiled.by_pixels(objective, variables, batch, key)[1]), -1, 1)
  assert (gradient[~np.asarray(shown)] == 0).all()  # what was not shown is not looked at
  assert (np.abs(gradient[np.asarray(shown)]).max(axis=(1, 2)) > 0).all()


def test_pixels_of_missing_channels_do_not_count_in_an_encoder_of_fixed_channels():
  objective, variables, batch = make('patch 2D')
  mask = jnp.array([[True, True, True], [True, False, True], [False, True, False], [True, True, False], [True] * 3])
  image = jnp.where(mask[:, None, None], batch['image'], 0.0)
  batch, key = dict(batch, image=image, channel_mask=mask), jax.random.key(2)
  (loss, _), (predicted, hidden, _) = compiled.both(objective, variables, variables['params'], batch, key)
  x = reference_patches(image, (4, 4), False)
  there = np.tile(np.asarray(mask), (1, 16))
  errors = []
  for b in range(5):
    own, guess = x[b][:, there[b]], np.asarray(predicted, np.float64)[b][:, there[b]]
    target = (own - own.mean(-1, keepdims=True)) / np.sqrt(own.var(-1, ddof=1, keepdims=True) + 1e-6)
    errors.append(((guess - target) ** 2).mean(-1))
  want = (np.stack(errors) * np.asarray(hidden)).sum() / np.asarray(hidden).sum()
  assert abs(float(loss) - want) < 1e-5 * want


def masks_of(objective, batch, count):
  """What `count` keys hide: [keys, B, C, N] bool."""
  draw = jax.jit(jax.vmap(lambda key: objective._mask(key, batch).hidden))
  hidden = np.asarray(draw(jax.random.split(jax.random.key(2), count))) > 0
  return hidden.reshape(count, len(batch['image']), batch['channels'].shape[1], -1)


@pytest.mark.parametrize('patches,channels', [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.3, 0.5)])
def test_dynamic_masks(patches, channels):
  """Each mode by its law: patches of each channel by itself, k ~ U{0 .. C - 1} whole channels, or both."""
  objective, _, batch = make('channel 2D', mask_channels='dynamic', mask_ratio=0.75, patches_only=patches,
                             channels_only=channels)
  hidden = masks_of(objective, batch, 400)
  whole = hidden.all(axis=3).sum(axis=2)  # [keys, B] channels without a token
  assert (whole < 3).all() and (whole == whole[:, :1]).all()  # one number a batch
  left = (~hidden).sum(axis=3)  # [keys, B, C]; 3 of 12 are shown where patches are masked
  assert set(np.unique(left)) <= {0, 3, 12}
  by_patch, by_channel = (left == 3).any(axis=(1, 2)), (left == 12).any(axis=(1, 2))
  assert not (by_patch & by_channel).any()
  if (patches, channels) == (1.0, 0.0):
    assert by_patch.all() and not whole.any()
  else:
    assert by_channel.mean() == pytest.approx(channels, abs=0.08)
    counts = np.bincount(whole[:, 0], minlength=3) / 400
    np.testing.assert_allclose(counts[1:], (1 - patches) / 3, atol=0.08)
    assert len(np.unique(hidden.all(axis=3)[whole[:, 0] == 1][0], axis=0)) > 1  # which, is a sample's own


def test_dynamic_masks_hide_pixels_from_the_encoder():
  """The loss is that of a NumPy reference over what is hidden, and no hidden pixel reaches a prediction."""
  objective, variables, batch = make('channel 2D', mask_channels='dynamic', patches_only=0.0, channels_only=0.0)

  @jax.jit
  def slope(image, key):
    return jax.grad(lambda x: objective._predict(variables['params'], batch | {'image': x}, key, True)[0].sum())(image)

  for seed in range(3):
    key = jax.random.key(seed)
    (loss, _), (predicted, hidden, _) = compiled.both(objective, variables, variables['params'], batch, key)
    target = reference_patches(batch['image'], objective.encoder.patch_size, True)
    target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
    error = np.square(np.asarray(predicted, np.float64) - target).mean(-1)
    want = (error * np.asarray(hidden)).sum() / max(float(hidden.sum()), 1.0)
    assert float(loss) == pytest.approx(want, rel=1e-5)
    touched = reference_patches(slope(batch['image'], key), objective.encoder.patch_size, True)
    assert not np.abs(touched[np.asarray(hidden) > 0]).any() and np.abs(touched[np.asarray(hidden) == 0]).any()


def test_dynamic_masks_of_samples_with_missing_channels():
  objective, _, batch = make('channel 2D', mask_channels='dynamic', patches_only=0.0, channels_only=1.0)
  batch |= {'channel_mask': jnp.asarray([[True] * 3, [True, False, True], [False, True, False]] * 2)[:5]}
  hidden = masks_of(objective, batch, 200)
  assert not hidden[:, ~np.asarray(batch['channel_mask'])].any()
  assert (hidden.all(axis=3).sum(axis=2) < np.asarray(batch['channel_mask']).sum(axis=1)).all()  # one is always shown


def test_dynamic_masks_need_channel_tokens():
  with pytest.raises(UserError, match='it needs a channel_vit'):
    make('patch 2D', mask_channels='dynamic')
  with pytest.raises(UserError, match='together at most 1'):
    make('channel 2D', mask_channels='dynamic', patches_only=0.8)
