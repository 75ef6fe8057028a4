"""SimCLR, MoCo v3, BYOL, Barlow Twins, VICReg, LeJEPA: the whole loss against float64 NumPy, heads included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.objectives.contrastive.barlow import BarlowTwins
from jaxmed.objectives.contrastive.byol import BYOL
from jaxmed.objectives.contrastive.lejepa import LeJEPA
from jaxmed.objectives.contrastive.mocov3 import MoCoV3
from jaxmed.objectives.contrastive.simclr import SimCLR
from jaxmed.objectives.contrastive.vicreg import VICReg
from tests.objectives.siamese_fakes import (
    all_views,
    batch,
    close,
    each_view,
    encoder,
    evaluate,
    features,
    numpy_norm,
    start,
    unit,
)
from tests.objectives.test_contrast import epps_pulley_reference, info_nce_reference, nt_xent_reference

RELATIVE = 1e-4  # of the whole network: an encoder in float32 before the loss


def online(variables):
  return variables['params']['encoder']


@pytest.mark.parametrize('kind,views', [('vit', 2), ('channel 3D', 3)])
def test_simclr(kind, views):
  objective, variables, data = start(SimCLR, kind, batch(kind, 6, views), out_dim=8, temperature=0.3,
                                     sum_views=views == 3)
  loss, (metrics, _) = evaluate(objective, variables, data)
  z = all_views(variables['params']['projector'], features(objective, online(variables), data['global']))
  close(loss, nt_xent_reference(z, 0.3) * (3 if views == 3 else 1), RELATIVE)
  close(metrics['nt_xent'], nt_xent_reference(z, 0.3), RELATIVE)
  assert 0 <= float(metrics['contrast_accuracy']) <= 1
  stats = metrics['stats']['projector']['norm0']
  x = features(objective, online(variables), data['global']).reshape(6 * views, -1)
  hidden = x @ np.asarray(variables['params']['projector']['dense0']['kernel'], np.float64)
  np.testing.assert_allclose(stats['mean'], 0.1 * hidden.mean(axis=0), rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * hidden.var(axis=0, ddof=1), rtol=1e-3)


@pytest.mark.parametrize('views', [2, 3])
def test_mocov3(views):
  objective, variables, data = start(MoCoV3, 'channel', batch('channel', 6, views), hidden_dim=24, out_dim=8,
                                     feature='mean')
  loss, (metrics, _) = evaluate(objective, variables, data)
  params, target, group = variables['params'], variables['target'], data['global']
  q = each_view(params['projector'], features(objective, params['encoder'], group, 'mean'))
  q = unit(each_view(params['predictor'], q))
  k = unit(each_view(target['projector'], features(objective, target['encoder'], group, 'mean')))
  one = {(i, j): 2 * 0.2 * info_nce_reference(q[:, i], k[:, j], 0.2) for i in range(views) for j in range(views)}
  want = 2 * np.mean([v for (i, j), v in one.items() if i != j])
  close(loss, want, RELATIVE)
  if views == 2:
    assert want == pytest.approx(one[0, 1] + one[1, 0])  # the official sum of both directions
  stats = metrics['stats']['projector']['norm0']
  x = features(objective, params['encoder'], group, 'mean')
  hidden = x @ np.asarray(params['projector']['dense0']['kernel'], np.float64)
  assert np.abs(hidden[:, 0].mean(axis=0) - hidden.mean(axis=(0, 1))).max() > 1e-3
  np.testing.assert_allclose(stats['mean'], 0.1 * hidden.mean(axis=(0, 1)), atol=1e-5)
  np.testing.assert_allclose(stats['var'], 0.9 + 0.1 * hidden.var(axis=0, ddof=1).mean(axis=0), atol=1e-5)


def test_mocov3_freezes_the_patch_projection():
  frozen = MoCoV3(encoder('channel')).frozen(jnp.int32(3))
  assert list(frozen) == ['encoder/patch_embed'] and bool(frozen['encoder/patch_embed'])
  assert MoCoV3(encoder('channel'), freeze_patch_embed=False).frozen(0) == {}
  assert MoCoV3(encoder('conv')).frozen(0) == {}
  params = jax.eval_shape(MoCoV3(encoder('channel')).init, jax.random.key(0), batch('channel'))['params']
  assert 'patch_embed' in params['encoder']


@pytest.mark.parametrize('views', [2, 3])
def test_byol(views):
  objective, variables, data = start(BYOL, 'vit', batch('vit', 6, views), hidden_dim=24, out_dim=8)
  loss, _ = evaluate(objective, variables, data)
  params, target, group = variables['params'], variables['target'], data['global']
  q = unit(each_view(params['predictor'], each_view(params['projector'], features(objective, params['encoder'], group))))
  t = unit(each_view(target['projector'], features(objective, target['encoder'], group)))
  want = 2 * np.mean([2 - 2 * (q[:, i] * t[:, j]).sum(axis=-1).mean()
                      for i in range(views) for j in range(views) if i != j])
  close(loss, want, RELATIVE)


@pytest.mark.parametrize('views', [2, 3])
def test_barlow(views):
  objective, variables, data = start(BarlowTwins, 'vit', batch('vit', 8, views), hidden_dim=12, scale=0.5)
  loss, (metrics, _) = evaluate(objective, variables, data)
  z = each_view(variables['params']['projector'], features(objective, online(variables), data['global']))
  terms = []
  for i in range(views):
    for j in range(i + 1, views):
      c = numpy_norm(z[:, i]).T @ numpy_norm(z[:, j]) / 8
      on = ((np.diag(c) - 1) ** 2).sum()
      terms.append((on, (c**2).sum() - (np.diag(c) ** 2).sum()))
  on, off = np.mean(terms, axis=0)
  close(loss, 0.5 * (on + 0.0051 * off), RELATIVE)
  close(metrics['off_diagonal'], off, RELATIVE)


@pytest.mark.parametrize('views', [2, 3])
def test_vicreg(views):
  objective, variables, data = start(VICReg, 'vit', batch('vit', 8, views), hidden_dim=12)
  loss, (metrics, _) = evaluate(objective, variables, data)
  z = each_view(variables['params']['projector'], features(objective, online(variables), data['global']))
  pairs = [(i, j) for i in range(views) for j in range(i + 1, views)]
  invariance = np.mean([((z[:, i] - z[:, j]) ** 2).mean() for i, j in pairs])
  spread = np.mean([np.maximum(0, 1 - np.sqrt(z[:, v].var(axis=0, ddof=1) + 1e-4)).mean() for v in range(views)])
  covariances = [np.cov(z[:, v], rowvar=False) for v in range(views)]
  redundant = 2 * np.mean([((m - np.diag(np.diag(m))) ** 2).sum() / 12 for m in covariances])
  close(loss, 25 * invariance + 25 * spread + redundant, RELATIVE)
  close(metrics['covariance'], redundant, RELATIVE)
  assert spread > 0 or views == 3


@pytest.mark.parametrize('local', [0, 3])
def test_lejepa(local):
  data = batch('channel', 8, 2, local)
  objective, variables, data = start(LeJEPA, 'channel', data, hidden_dim=24, out_dim=8, slices=32)
  loss, (metrics, _) = evaluate(objective, variables, data, seed=3)
  x = [features(objective, online(variables), data[name]) for name in ('global', 'local') if name in data]
  z = all_views(variables['params']['projector'], np.concatenate(x, axis=1))
  assert z.shape == (8, 2 + local, 8)
  prediction = ((z - z[:, :2].mean(axis=1, keepdims=True)) ** 2).mean()
  key = jax.random.split(jax.random.key(3))[1]
  directions = unit(np.asarray(jax.random.normal(key, (8, 32)), np.float64).T).T
  gaussian = epps_pulley_reference(z.swapaxes(0, 1) @ directions, 17, 3.0).mean()
  close(metrics['prediction'], prediction, RELATIVE)
  close(metrics['sigreg'], gaussian, RELATIVE)
  close(loss, 0.95 * prediction + 0.05 * gaussian, RELATIVE)
