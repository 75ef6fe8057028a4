"""Self-distillation beside PyTorch: DINO's loss and gradients, weight-normalised heads, KoLeo, iBOT, the Gram loss.

The PyTorch side is written from the papers' definitions with PyTorch's own functions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.decoders.heads import DINOHead
from jaxmed.objectives.distillation import self_distillation as lib

torch = pytest.importorskip('torch')
F = torch.nn.functional
RNG = np.random.default_rng(0)
BATCH, VIEWS, K = 5, 6, 24


def tensor(x, grad=False):
  return torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=grad)


def same(have, want, relative=1e-5):
  want = want.detach().numpy() if isinstance(want, torch.Tensor) else want
  np.testing.assert_allclose(np.asarray(have), want, rtol=relative, atol=relative * np.abs(want).max())


def test_dino_loss_and_gradient():
  student, teacher = RNG.normal(size=(BATCH, VIEWS, K)), RNG.normal(size=(BATCH, 2, K))
  centre = RNG.normal(size=K)
  s = tensor(student, True)
  q = F.softmax((tensor(teacher) - tensor(centre)) / 0.05, dim=-1)
  terms = [-(q[:, t] * F.log_softmax(s[:, v] / 0.1, dim=-1)).sum(-1).mean()
           for t in range(2) for v in range(VIEWS) if t != v]
  want = torch.stack(terms).mean()
  want.backward()
  ours = lambda x: lib.cross_view(x, lib.centred(jnp.asarray(teacher, jnp.float32), jnp.asarray(centre), 0.05), 0.1)
  value, gradient = jax.jit(jax.value_and_grad(ours))(jnp.asarray(student, jnp.float32))
  same(value, want)
  same(gradient, s.grad, 1e-4)


@pytest.mark.parametrize('last', ['weight_norm', 'fixed_norm', 'linear'])
def test_head(last):
  head = DINOHead(K, hidden_dim=12, bottleneck_dim=8, last=last)
  x = RNG.normal(size=(BATCH, 10))
  params = head.init(jax.random.key(0), jnp.zeros((1, 10)))['params']
  params = jax.tree.map(lambda p: jnp.asarray(p + 0.3 * RNG.normal(size=p.shape), jnp.float32), params)
  p = jax.tree.map(lambda a: np.asarray(getattr(a, 'value', a)), params, is_leaf=lambda a: hasattr(a, 'value'))
  h = tensor(x)
  for name in ('dense0', 'dense1'):
    h = F.gelu(F.linear(h, tensor(p[name]['kernel'].T), tensor(p[name]['bias'])))
  h = F.normalize(F.linear(h, tensor(p['bottleneck']['kernel'].T), tensor(p['bottleneck']['bias'])), dim=-1)
  layer = torch.nn.Linear(8, K, bias=False, dtype=torch.float64)
  layer.weight.data = tensor(p['last']['kernel'].T)
  if last != 'linear':
    layer = torch.nn.utils.parametrizations.weight_norm(layer)
    length = p['last'].get('length', np.ones(K))
    layer.parametrizations.weight.original0.data = tensor(length)[:, None]
  same(head.apply({'params': params}, jnp.asarray(x, jnp.float32)), layer(h))


def test_koleo_and_gradient():
  x = RNG.normal(size=(9, 6))
  t = tensor(x, True)
  unit = F.normalize(t, dim=-1, eps=1e-8)
  dots = (unit @ unit.T).fill_diagonal_(-1.0)
  near = unit[dots.argmax(dim=1)]
  want = -torch.log(torch.nn.PairwiseDistance(2, eps=1e-8)(unit, near) + 1e-8).mean()
  want.backward()
  value, gradient = jax.jit(jax.value_and_grad(lib.koleo))(jnp.asarray(x, jnp.float32))
  same(value, want)
  same(gradient, t.grad, 1e-4)


def test_ibot_patch_loss():
  student, teacher = RNG.normal(size=(4, 9, K)), RNG.normal(size=(4, 9, K))
  mask = RNG.random((4, 9)) < 0.4
  mask[2] = False
  each = (F.softmax(tensor(teacher) / 0.06, dim=-1) * F.log_softmax(tensor(student) / 0.1, dim=-1)).sum(-1)
  marked = torch.tensor(mask)
  want = -((each * marked).sum(-1) / marked.sum(-1).clamp(min=1.0)).mean()
  index, places = lib.chosen(jnp.asarray(mask), int(mask.sum(1).max()))
  pick = lambda x: jnp.take_along_axis(jnp.asarray(x, jnp.float32), index[..., None], axis=1)
  same(lib.patch_loss(pick(student), lib.centred(pick(teacher), 0.0, 0.06), places, 0.1), want)


@pytest.mark.parametrize('old, new', [((12, 12), (6, 6)), ((9, 12), (6, 5)), ((4, 4), (7, 6))])
def test_resized_patches_are_torchs_bicubic(old, new):
  x = RNG.normal(size=(2, old[0] * old[1], 3))
  image = tensor(x).transpose(1, 2).reshape(2, 3, *old)
  want = F.interpolate(image, size=new, mode='bicubic', align_corners=False, antialias=False)
  same(lib.resized(jnp.asarray(x, jnp.float32), old, new), want.flatten(2).transpose(1, 2))


def test_gram_loss_and_gradient():
  student, teacher = RNG.normal(size=(3, 7, 5)), RNG.normal(size=(3, 7, 5))
  s = tensor(student, True)
  matrix = lambda x: F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).transpose(-1, -2)
  want = F.mse_loss(matrix(s), matrix(tensor(teacher)))
  want.backward()
  value, gradient = jax.jit(jax.value_and_grad(lib.gram_loss))(*(jnp.asarray(x, jnp.float32) for x in (student, teacher)))
  same(value, want)
  same(gradient, s.grad, 1e-4)
