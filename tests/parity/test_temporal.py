"""MS-TCN and TeCNO, padded videos in a batch, against their layers in PyTorch on each alone; losses by PyTorch's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models.decoders.temporal import MultiStage
from jaxmed.objectives.losses import temporal
from tests.models.test_temporal import SMALL, params_of

torch = pytest.importorskip('torch')


def conv(params, x, **options):
  """A torch convolution [B, C, T] with a kernel [K, C, D] or [C, D] of ours."""
  kernel = np.asarray(params['kernel'])
  kernel = kernel[None] if kernel.ndim == 2 else kernel
  weight, bias = torch.tensor(kernel.transpose(2, 1, 0)), torch.tensor(np.asarray(params['bias']))
  return torch.nn.functional.conv1d(x, weight, bias, **options)


def reference(params, x, causal):
  """Logits [S, B, K, T] of x [B, D, T], videos of one length."""
  out = []
  for s in range(SMALL['stages']):
    p = params['params'][f'stage_{s}']
    h = conv(p['project'], x)
    for i in range(SMALL['layers']):
      layer, d = p[f'layer_{i}'], 2**i
      y = torch.relu(conv(layer, h, padding=2 * d if causal else d, dilation=d))
      y = y[:, :, : -2 * d] if causal else y
      h = h + conv(layer['out'], y)
    logits = conv(p['out'], h)
    out.append(logits)
    x = torch.softmax(logits, dim=1)
  return torch.stack(out)


@pytest.mark.parametrize('causal', [True, False])
def test_stages(causal):
  rng = np.random.default_rng(0)
  x, mask = rng.normal(size=(2, 19, 5)).astype(np.float32), np.arange(19) < np.array([[19], [13]])
  model = MultiStage(3, causal=causal, **SMALL)
  params = params_of(model, x)
  got = model.apply(params, jnp.asarray(x), jnp.asarray(mask))
  for b, length in enumerate((19, 13)):
    want = reference(params, torch.tensor(x[b : b + 1, :length].transpose(0, 2, 1)), causal)[:, 0]
    np.testing.assert_allclose(got[:, b, :length], want.numpy().transpose(0, 2, 1), atol=1e-5)


def test_losses():
  rng = np.random.default_rng(1)
  logits, labels = rng.normal(size=(2, 9, 4)).astype(np.float32) * 3, rng.integers(0, 4, (2, 9))
  mask = np.arange(9) < np.array([[9], [5]])
  labels[~mask] = -1
  weight = np.array([0.5, 1.0, 2.0, 0.1], np.float32)
  p = torch.tensor(logits.transpose(0, 2, 1), requires_grad=True)
  entropy = torch.nn.functional.cross_entropy(p, torch.tensor(labels), torch.tensor(weight), ignore_index=-1)
  change = (torch.log_softmax(p[:, :, 1:], 1) - torch.log_softmax(p.detach()[:, :, :-1], 1)) ** 2
  smooth = (change.clamp(0, 16) * torch.tensor(mask[:, None, 1:])).mean()
  (entropy + 0.15 * smooth).backward()

  def loss(x):
    return (temporal.class_cross_entropy(x, jnp.asarray(labels), weight)
            + 0.15 * temporal.truncated_mse(x, jnp.asarray(mask), compat='ms_tcn'))

  value, grad = jax.value_and_grad(loss)(jnp.asarray(logits))
  assert float(value) == pytest.approx(float(entropy + 0.15 * smooth), rel=1e-5)
  np.testing.assert_allclose(grad, p.grad.numpy().transpose(0, 2, 1), atol=1e-6)
