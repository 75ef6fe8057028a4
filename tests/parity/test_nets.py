"""D-Former, SWTR-Unet and multi-scale self-guided attention beside the same in PyTorch, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.contracts import PENALTY
from jaxmed.models import create_model
from jaxmed.models.decoders.dense import create_decoder
from tests.models.test_segmentation_decoders import network as decoding
from tests.models.test_unet import drawn, network, shapes

from .common import assert_same, image


def build(name, decoder, size, channels, options, deep):
  encoder = create_model(name, size, channels, **options)
  decoder = create_decoder(decoder, encoder, 3, deep)
  x = image((1, *size, channels))
  params = jax.tree_util.tree_map_with_path(
      lambda path, a: 1 + jnp.abs(a) if path[-1].key == 'var' else a, drawn(shapes(encoder, decoder, jnp.asarray(x))[0]))
  return encoder, decoder, params, x


def in_torch(x):
  import torch

  return torch.from_numpy(np.array(x, np.float64))


def test_dformer():
  """A map that groups divide, one that is padded to them in two axes, and one that is one group."""
  from . import nets_torch

  size = 4, 24, 40
  options = dict(depths=(2, 3, 2), dims=(8, 16, 24), num_heads=(2, 4, 2), stem_patch=(1, 2, 2), group_size=(2, 4, 4))
  encoder, decoder, params, x = build('dformer_micro', 'dformer', size, 2, options, True)
  want = nets_torch.dformer(params, in_torch(x), (2, 3, 2), (2, 4, 2), (1, 2, 2), (2, 4, 4))
  got = network(encoder, decoder, params, x)
  assert [y.shape[1:] for y in got] == [(*size, 3), (2, 12, 20, 3)]
  for have, right in zip(got, want, strict=True):
    assert_same(np.asarray(have), right.numpy())


def test_swtr_unet():
  from . import nets_torch

  options = dict(depths=(1, 2), dims=(8, 16), stem_width=8, num_heads=4, window_size=4, transformer_depth=2)
  encoder, decoder, params, x = build('swtr_unet_micro', 'unet', (24, 28), 2, options, False)
  want = nets_torch.swtr_unet(params, in_torch(x), (1, 2), 4, 4, 2)
  assert_same(np.asarray(network(encoder, decoder, params, x)[0]), want.numpy())


def test_msa_and_its_terms_of_the_loss():
  """Of a training pass: statistics of the batch, all outputs, and the two terms with their weights."""
  from . import nets_torch

  encoder = create_model('resnet_micro', (32, 32), 1, depths=(1, 1), dims=(8, 8), stem_width=8)
  decoder, params, x, maps = decoding('msa', encoder, deep_supervision=True, width=16)
  got, left = jax.jit(lambda p: decoder.apply({'params': p}, x, maps, True, mutable=['stats', PENALTY]))(params)
  want, codes, made = nets_torch.msa(params, [in_torch(m) for m in maps], (32, 32))
  assert len(got) == len(want) == 5
  for have, right in zip(got, want, strict=True):
    assert_same(np.asarray(have), right.numpy())
  assert float(left[PENALTY]['guided'][0]) == pytest.approx(0.25 * codes + 0.1 * made, rel=1e-4) and codes > 0.1
