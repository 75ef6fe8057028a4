"""Checkpoints as trainers and hubs write them: averaged weights, odd company, shards, sizes that a table does not tell."""

import argparse
import collections
import datetime
import io
import json
import logging
import pathlib
import pickle
import sys
import types
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxmed import cli, interop
from jaxmed.errors import UserError
from jaxmed.interop import state_dict
from jaxmed.interop.pickle_io import read_pickle
from jaxmed.interop.safetensors_io import read_tensors
from jaxmed.interop.timm import from_timm, to_timm

from .test_roundtrip import build, to_contiguous


@pytest.fixture
def torch_like(monkeypatch):
  """A stand-in of torch that pickles arrays as torch.save does: `save(path, content, zipped)`."""
  torch, utils = types.ModuleType('torch'), types.ModuleType('torch._utils')
  def rebuild(*args):
    raise AssertionError('nothing of a file is called')

  rebuild.__module__, rebuild.__qualname__, rebuild.__name__ = 'torch._utils', '_rebuild_tensor_v2', '_rebuild_tensor_v2'
  utils._rebuild_tensor_v2 = rebuild
  torch.FloatStorage = type('FloatStorage', (), {'__module__': 'torch'})
  monkeypatch.setitem(sys.modules, 'torch', torch)
  monkeypatch.setitem(sys.modules, 'torch._utils', utils)

  class Stored:
    def __init__(self, array):
      self.array = np.ascontiguousarray(array, '<f4')

  class Tensor(Stored):
    def __reduce__(self):
      strides = tuple(s // 4 for s in self.array.strides)
      return rebuild, (Stored(self.array), 0, self.array.shape, strides, False, collections.OrderedDict())

  class Pickler(pickle.Pickler):
    def __init__(self, file):
      super().__init__(file, 2)
      self.arrays = []

    def persistent_id(self, value):
      if type(value) is not Stored:
        return None
      self.arrays.append(value.array)
      return 'storage', torch.FloatStorage, str(len(self.arrays) - 1), 'cpu', value.array.size

  def save(path, content, zipped=True):
    file = io.BytesIO()
    pickler = Pickler(file)
    pickler.dump(content)
    if zipped:
      with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a/data.pkl', file.getvalue())
        for i, array in enumerate(pickler.arrays):
          archive.writestr(f'a/data/{i}', array.tobytes())
      return
    with open(path, 'wb') as f:
      for part in (0x1950A86A20F9469CFC6C, 1001, {}):
        pickle.dump(part, f, 2)
      f.write(file.getvalue())
      pickle.dump([str(i) for i in range(len(pickler.arrays))], f, 2)
      for array in pickler.arrays:
        f.write(array.size.to_bytes(8, 'little') + array.tobytes())

  return types.SimpleNamespace(save=save, Tensor=Tensor)


@pytest.mark.parametrize('zipped', [True, False])
def test_what_lies_beside_the_weights_is_left_out(torch_like, zipped, tmp_path):
  weight = np.arange(6, dtype=np.float32).reshape(2, 3)
  counts = collections.defaultdict(list, {'a': [1]})
  content = {
    'model': collections.OrderedDict(w=torch_like.Tensor(weight)), 'more': collections.defaultdict(dict, {'v': torch_like.Tensor(weight + 1)}),
    'scheduler': {'milestones': collections.Counter({30: 1, 60: 1}), 'base': collections.Counter('ab')},
    'array': np.zeros(3), 'scalar': np.float64(0.1), 'ints': np.int64(3), 'random': np.random.RandomState(0).get_state(),
    'generator': np.random.default_rng(0), 'args': argparse.Namespace(lr=0.1, path=pathlib.Path('a/b')),
    'when': datetime.datetime(2024, 1, 2), 'delta': datetime.timedelta(1), 'kinds': {1, 2}, 'frozen': frozenset('a'),
    'counts': counts, 'factory': collections.defaultdict(int), 'deque': collections.deque([1]), 'bytes': bytearray(b'a'),
    'namespace': types.SimpleNamespace(a=1), 'inside': argparse.Namespace(hidden=torch_like.Tensor(weight + 9)),
    'structured': np.zeros(2, [('a', 'f4')]), 'masked': np.ma.masked_array([1.0, 2], [0, 1]), 'date': np.datetime64('2020')}
  torch_like.save(tmp_path / 'a.pth', content, zipped)
  found = read_pickle(tmp_path / 'a.pth')
  assert sorted(found) == ['model.w', 'more.v']
  np.testing.assert_array_equal(found['model.w'], weight)
  np.testing.assert_array_equal(found['more.v'], weight + 1)


class Foreign:
  pass


@pytest.mark.parametrize('value', [Foreign(), Foreign, print, collections.defaultdict(Foreign), collections.defaultdict(eval)])
def test_what_may_be_code_is_still_refused(torch_like, value, tmp_path):
  torch_like.save(tmp_path / 'a.pth', {'w': torch_like.Tensor(np.zeros(2)), 'x': value})
  with pytest.raises(UserError, match='could run code'):
    read_pickle(tmp_path / 'a.pth')


# Averaged weights

@pytest.fixture
def vit():
  return build('vit_micro/8', 16, {})


@pytest.mark.parametrize('plain, ema', [('state_dict.', 'state_dict_ema.'), ('model.', 'model_ema.'), ('', 'ema.'),
                                        ('model.module.', 'ema_model.module.'), ('params.', 'params_ema.'),
                                        ('student.backbone.', 'teacher.backbone.')])
def test_averaged_weights_are_taken_unless_plain_ones_are_wanted(plain, ema, vit, tmp_path, caplog):
  tensors = to_contiguous(to_timm(*vit))
  both = {plain + k: v for k, v in tensors.items()} | {ema + k: v + 1 for k, v in tensors.items()}
  safetensors.numpy.save_file(both, tmp_path / 'x.safetensors')
  for weights, more in ((None, 1), ('ema', 1), ('plain', 0)):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      interop.import_file(tmp_path / 'x.safetensors', 'timm', tmp_path / 'y.safetensors', 4, weights=weights)
    params = interop.load_file(tmp_path / 'y.safetensors')[1]
    jax.tree.map(lambda a, b, more=more: np.testing.assert_array_equal(a, b + np.float32(more)), params, vit[1])
    said = f"took {ema!r}, the EMA weights (--weights plain takes the others)"
    assert sum(said in r.message for r in caplog.records) == (weights is None)


def test_weights_that_are_not_there(vit, tmp_path):
  tensors = to_contiguous(to_timm(*vit))
  safetensors.numpy.save_file(tensors, tmp_path / 'x.safetensors')
  with pytest.raises(UserError, match='x.safetensors: has no ema weights: it has plain ones alone'):
    interop.import_file(tmp_path / 'x.safetensors', None, tmp_path / 'y', 2, weights='ema')
  with pytest.raises(UserError, match="unknown weights 'emas': did you mean 'ema'"):
    state_dict.of_weights(tensors, 'emas')
  assert not state_dict.is_average('schema.module.weight')
  assert not state_dict.is_average('blocks.0.ema')


# Sizes that a table of positions does not tell

def test_a_rectangle_and_a_class_token_is_no_square(tmp_path, vit):
  model, params = build('vit_micro/8', (32, 48), {})
  tensors = to_timm(model, params)
  assert tensors['pos_embed'].shape[1] == 25  # 4 x 6 and a class token, or 5 x 5
  with pytest.raises(UserError, match='25 rows: positions of 5 x 5 patches, .* --image-size 32 48, .* 48 32, .* 40 40$'):
    from_timm(tensors, 4)
  assert from_timm(tensors, 4, (32, 48))[0] == model
  square = from_timm(tensors, 4, (40, 40))[0]
  assert square.no_embed_class and square.image_size == (40, 40)
  safetensors.numpy.save_file(to_contiguous(tensors), tmp_path / 'x.safetensors')
  argv = ['import', str(tmp_path / 'x.safetensors'), '--out', str(tmp_path / 'y.safetensors'), '--num-heads', '4']
  assert cli.main(argv) == 2
  assert cli.main([*argv, '--image-size', '32', '48']) == 0
  assert interop.load_file(tmp_path / 'y.safetensors')[0].image_size == (32, 48)


def test_registers_tell_whether_a_square_is_of_patches_alone():
  model, params = build('vit_micro/8', 40, dict(num_registers=4, no_embed_class=True))
  assert from_timm(to_timm(model, params), 4)[0] == model
  # DINOv2's table has no rows for registers: 1 + 4 x 5 and four registers are 25 rows.
  model, params = build('vit_micro/8', (32, 40), {})
  tensors = to_timm(model, params) | {'register_tokens': np.ones((1, 4, 128), np.float32)}
  with pytest.raises(UserError, match='25 rows.*5 tokens before them: pass --image-size'):
    from_timm(tensors, 4)
  assert from_timm(tensors, 4, (32, 40))[0].num_registers == 4


# Shards

@pytest.fixture
def shards(tmp_path, vit):
  """A folder with the weights in two files and their index."""
  tensors = to_contiguous(to_timm(*vit))
  names = sorted(tensors)
  where = {name: f'model-0000{1 + i % 2}-of-00002.safetensors' for i, name in enumerate(names)}
  for file in set(where.values()):
    extra = {'steps': np.array(3)} if '00001' in file else {'cls_token': tensors['cls_token'] + 5}  # a stale copy
    safetensors.numpy.save_file({n: tensors[n] for n in names if where[n] == file} | extra, tmp_path / file)
  where['steps'] = 'model-00001-of-00002.safetensors'
  where['cls_token'] = where['steps']
  stale = safetensors.numpy.load_file(tmp_path / where['steps']) | {'cls_token': tensors['cls_token']}
  safetensors.numpy.save_file(stale, tmp_path / where['steps'])
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {'total_size': 1}, 'weight_map': where}))
  return tmp_path, tensors


def test_shards_are_read_by_their_index_or_their_folder(shards):
  folder, tensors = shards
  (folder / 'consolidated.safetensors').write_bytes(b'')  # what the index does not name is not read
  for place in (folder, folder / 'model.safetensors.index.json'):
    found, metadata = read_tensors(place)
    assert metadata == {}
    assert sorted(found) == sorted(tensors)
    for name, value in tensors.items():
      np.testing.assert_array_equal(found[name], value)
  assert cli.main(['import', str(folder), '--out', str(folder / 'out.safetensors'), '--num-heads', '4']) == 0


def test_a_folder_of_one_file(tmp_path):
  with pytest.raises(UserError, match='is a folder without weights: expected model.safetensors'):
    read_tensors(tmp_path)
  safetensors.numpy.save_file({'a': np.ones(2)}, tmp_path / 'model.safetensors')
  assert list(read_tensors(tmp_path)[0]) == ['a']
  safetensors.numpy.save_file({'a': np.ones(2)}, tmp_path / 'other.safetensors')
  with pytest.raises(UserError, match='2 files of weights and no index.*model.safetensors, other.safetensors'):
    read_tensors(tmp_path)


@pytest.mark.parametrize('change, match', [
    (lambda folder, index: (folder / 'model-00002-of-00002.safetensors').unlink(),
     r'index.json names the shard model-00002-of-00002.safetensors, which does not exist'),
    (lambda folder, index: index['weight_map'].update(lost='model-00002-of-00002.safetensors'),
     "model-00002-of-00002.safetensors has no tensor 'lost', which model.safetensors.index.json says"),
    (lambda folder, index: index['weight_map'].update(a='../x.safetensors'), r"names the shard '../x.safetensors'"),
    (lambda folder, index: index['weight_map'].update(a='model.safetensors.index.json'), 'names the shard'),
    (lambda folder, index: index.update(weight_map=3), 'is no index of shards: expected weight_map'),
    (lambda folder, index: index.clear(), 'is no index of shards'),
    (lambda folder, index: (folder / 'model-00001-of-00002.safetensors').write_bytes(b'cut'),
     'cannot read .*00001-of-00002.safetensors as safetensors')])
def test_shards_that_do_not_fit(change, match, shards):
  folder, _ = shards
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  change(folder, index)
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(UserError, match=match):
    read_tensors(folder)


# DINOv3

def dinov3(model, params, rng):
  """The state dict of DINOv3's class, with masked biases of keys, for a model of that kind."""
  tensors = to_timm(model.clone(pos='none', norm_epsilon=1e-6), params)
  del tensors['pos_embed']
  tensors['storage_tokens'] = tensors.pop('reg_token')
  tensors['mask_token'] = np.zeros((1, model.embed_dim), np.float32)
  count = model.embed_dim // model.num_heads // 4
  tensors['rope_embed.periods'] = (100 ** (np.arange(count) / count) * rng.uniform(0.998, 1.002, count)).astype(np.float32)
  for i in range(model.depth):
    mask = np.repeat([1, 0, 1], model.embed_dim).astype(np.float32)
    tensors[f'blocks.{i}.attn.qkv.bias_mask'] = mask if i else np.full_like(mask, np.nan)
    if model.mlp == 'swiglu':
      for leaf in ('weight', 'bias'):
        gate, value = np.split(tensors.pop(f'blocks.{i}.mlp.fc1.{leaf}'), 2)
        tensors |= {f'blocks.{i}.mlp.w1.{leaf}': gate, f'blocks.{i}.mlp.w2.{leaf}': value,
                    f'blocks.{i}.mlp.w3.{leaf}': tensors.pop(f'blocks.{i}.mlp.fc2.{leaf}')}
  return tensors


@pytest.mark.parametrize('mlp', ['gelu', 'swiglu'])
def test_dinov3(mlp, tmp_path):
  rng = np.random.default_rng(0)
  model, params = build('vit_micro/8', 112, dict(pos='rope', num_registers=4, layer_scale=1e-5, norm_epsilon=1e-5, mlp=mlp))
  tensors = dinov3(model, params, rng)
  safetensors.numpy.save_file(to_contiguous(tensors), tmp_path / 'x.safetensors')
  interop.import_file(tmp_path / 'x.safetensors', None, tmp_path / 'y.safetensors')
  read, found, _ = interop.load_file(tmp_path / 'y.safetensors')
  assert read == model  # heads and base are those of the periods
  for i in range(model.depth):
    bias = np.array(params['transformer']['blocks']['attn']['qkv']['bias'][i])
    read_bias = np.array(found['transformer']['blocks']['attn']['qkv']['bias'][i])
    np.testing.assert_array_equal(read_bias[1], 0)
    np.testing.assert_array_equal(read_bias[[0, 2]], bias[[0, 2]])
  np.testing.assert_array_equal(found['register_tokens'], params['register_tokens'])
  other = tensors | {'rope_embed.periods': np.linspace(1, 9, len(tensors['rope_embed.periods'])).astype(np.float32)}
  with pytest.raises(UserError, match='rope_embed.periods are 1, .*: expected powers of one base'):
    from_timm(other)
  with pytest.raises(UserError, match=r"'cls_norm.weight' .*no place"):
    from_timm(tensors | {'cls_norm.weight': np.ones(128, np.float32)})
  with pytest.raises(UserError, match='leave --num-heads out'):
    from_timm(tensors, 8)
  with pytest.raises(UserError, match='has no rotary positions'):
    to_timm(model, params)


def test_what_has_no_place_is_told_before_the_size_is_asked_for(vit):
  tensors = to_timm(*vit)
  del tensors['pos_embed']
  with pytest.raises(UserError, match="'blocks.0.gamma_1' .*no place"):
    from_timm(tensors | {'blocks.0.gamma_1': np.ones(128, np.float32)}, 4)
