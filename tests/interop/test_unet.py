"""Files of U-Nets and of ResNets of videos: what goes in comes back, what a foreign file tells, what formats cannot hold."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed import interop
from jaxmed.errors import UserError
from jaxmed.interop import nnssl, nnunet, pickle_io, safetensors_io, state_dict, stunet, verify, weight_formats
from jaxmed.interop.nnunet import Network
from jaxmed.models import create_model
from jaxmed.models.decoders.dense import create_decoder
from tests.models.test_unet import drawn, shapes

INFO = {'feature': 'mean', 'method': 'mae'}
SMALL = dict(depths=(1, 2, 1), dims=(8, 8, 12), kernels='1x3x3,3,3', strides='1,1x2x2,2')
MODELS = {
    'nnunet': ('nnunet_micro', (2, 8, 8), SMALL), 'nnunet residual': ('resenc_micro', (2, 8, 8), SMALL | dict(stem_width=6)),
    'stunet': ('stunet_micro', (2, 8, 8), SMALL), 'torchvision': ('mc3_18', (2, 16, 16), {})}


@functools.cache
def build(case):
  name, size, options = MODELS[case]
  model = create_model(name, size, 2, **options)
  rng = np.random.default_rng(0)
  flat = {k: (0.1 * rng.normal(size=s) + (k.endswith('var'))).astype(np.float32)
          for k, s in state_dict.shapes_of(model).items()}
  return model, flax.traverse_util.unflatten_dict(flat, sep='/')


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('case', MODELS)
def test_a_file_gives_back_model_and_params(case, tmp_path):
  model, params = build(case)
  path, fmt = tmp_path / 'm.safetensors', case.split()[0]
  interop.export_file(path, fmt, model, params, INFO)
  have, have_params, info = interop.load_file(path)
  assert (have, info) == (model, INFO)
  same(have_params, params)
  tensors = safetensors_io.read_tensors(path)[0]
  assert weight_formats.guess_format({'module.' + k: v for k, v in tensors.items()}) == fmt
  card = verify.model_card(fmt, model, INFO, file=path)
  assert 'encoder' in card and fmt in card


def test_an_export_is_checked_by_its_features(tmp_path):
  model, params = build('nnunet residual')
  interop.export_file(tmp_path / 'm.safetensors', 'nnunet', model, params, INFO)
  assert verify.verify_export(tmp_path / 'm.safetensors', model, params, jnp.ones((1, 4, 8, 8, 2))) < 1e-5


@pytest.mark.parametrize('case', ['nnunet', 'nnunet residual', 'stunet'])
@pytest.mark.parametrize('deep', [True, False])
def test_networks_with_a_decoder(case, deep):
  """All of both comes back; heads that are not there are written as zeros."""
  encoder, params = build(case)
  decoder = create_decoder('unet', encoder, 4, deep)
  x = jnp.zeros((1, 4, 8, 8, 2))
  decoder_params = drawn(shapes(encoder, decoder, x)[0]['decoder'])
  write, read = (stunet.to_stunet, stunet.from_stunet) if case == 'stunet' else (nnunet.to_nnunet, nnunet.from_nnunet)
  tensors = write(Network(encoder, params, decoder, decoder_params))
  back = read({'network_weights.' + k: v for k, v in tensors.items()}, (2, 8, 8), encoder.strides)
  assert back.decoder.clone(deep_supervision=deep, kernels=decoder.kernels) == decoder
  same(back.params, params)
  heads = {name for name in back.decoder_params if name.startswith('head')}
  assert heads == {'head1', 'head2'} and np.asarray(back.decoder_params['head2']['kernel']).any() == deep
  same({k: v for k, v in back.decoder_params.items() if k in decoder_params}, decoder_params)


def test_strides_follow_from_the_decoder():
  encoder, params = build('nnunet')
  decoder = create_decoder('unet', encoder, 2, True)
  decoder_params = drawn(shapes(encoder, decoder, jnp.zeros((1, 4, 8, 8, 2)))[0]['decoder'])
  whole = nnunet.to_nnunet(Network(encoder, params, decoder, decoder_params))
  assert nnunet.from_nnunet(whole).encoder.strides == '1x1x1,1x2x2,2x2x2' and encoder.patch_size == (2, 4, 4)
  alone = nnunet.to_nnunet(Network(encoder, params))
  assert nnunet.from_nnunet(alone).encoder.patch_size == (4, 4, 4)  # nothing tells them


def test_a_checkpoint_is_read_back(tmp_path):
  model, params = build('nnunet residual')
  nnssl.write_checkpoint(tmp_path / 'c.pth', model, params)
  tensors = pickle_io.read_pickle(tmp_path / 'c.pth')
  network = nnunet.from_nnunet(tensors, (2, 8, 8), model.strides)
  assert network.encoder.clone(kernels=model.kernels, strides=model.strides) == model
  same(network.params, params)
  # Layers with two names are stored once.
  assert (tmp_path / 'c.pth').stat().st_size < 1.2 * sum(x.nbytes for x in jax.tree.leaves(params)) + 50_000


def test_what_is_pickled_comes_back(tmp_path):
  a = np.arange(12, dtype=np.float32).reshape(3, 4)
  pickle_io.write_pickle(tmp_path / 'a.pth', {'x': {'a': a, 'b': a.T, 'same': a}, 'n': [1, -2.5, None, True, ('t', {})]})
  back = pickle_io.read_pickle(tmp_path / 'a.pth')
  assert back.keys() == {'x.a', 'x.b', 'x.same'}
  np.testing.assert_array_equal(back['x.a'], a)
  np.testing.assert_array_equal(back['x.b'], a.T)
  with pytest.raises(TypeError, match='set'):
    pickle_io.write_pickle(tmp_path / 'b.pth', {'x': {1, 2}})


@pytest.mark.parametrize('fmt, name, options, words', [
    ('nnunet', 'stunet_micro', {}, 'plain and ResEnc'), ('nnunet', 'nnunet_micro', dict(norm='batch'), 'instance norm'),
    ('nnunet', 'nnunet_micro', dict(mask_token=True), 'no mask token'), ('stunet', 'nnunet_micro', {}, 'STU-Nets'),
    ('stunet', 'stunet_micro', dict(down='max'), 'down=max'), ('torchvision', 'r3d_micro', {}, 'two blocks a stage'),
    ('torchvision', 'resnet_micro', {}, 'ResNets of videos'), ('timm', 'r3d_micro', {}, '2D models')])
def test_what_a_format_cannot_hold(fmt, name, options, words):
  size = (64, 64) if name == 'resnet_micro' else (32, 32, 32)
  model = create_model(name, size, 1, **options)
  with pytest.raises(UserError, match=words):
    weight_formats.FORMATS[fmt].write(model, {})


def test_what_is_missing_or_too_many():
  tensors = nnunet.to_nnunet(Network(*build('nnunet')))
  with pytest.raises(UserError, match='tensor .*norm.bias.* is missing'):
    nnunet.from_nnunet({k: v for k, v in tensors.items() if 'stages.2.0.convs.0.norm.bias' not in k})
  with pytest.raises(UserError, match='no place'):
    nnunet.from_nnunet(tensors | {'encoder.more': np.zeros(3)})
