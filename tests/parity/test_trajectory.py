"""Fifty training steps beside PyTorch: the same losses from the same weights, views, masks and schedules.

Our side is the compiled Trainer.step in float32; the other is written from the definitions of the methods on timm's
blocks and torch.optim.AdamW, in float64. Losses are compared relative to their own size.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.interop import state_dict
from jaxmed.interop.timm import to_timm
from jaxmed.models import create_model
from jaxmed.objectives import DINO, MAE, SimCLR
from jaxmed.objectives.networks import Clock
from jaxmed.parallel import mesh as mesh_lib
from jaxmed.train.optimizer import Optimizer
from jaxmed.train.step import Trainer

STEPS, WARMUP, BATCHES, COUNT = 50, 5, 4, 8
SIZE, PATCH, DIM, DEPTH, HEADS = 16, 4, 32, 2, 2
RATE, DECAY = 2e-3, 0.1
BOUND = 1e-3  # of the relative difference of a loss


class AsGiven:
  """The view maker of batches that are views already."""

  channel_sampling = 'none'

  def __call__(self, rng, batch):
    return batch


def encoder(**options):
  return create_model(f'vit_micro/{PATCH}', SIZE, 3, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, **options)


def images(views, size):
  """[BATCHES, COUNT, views, size, size, 3]: waves of each sample's own, seen with noise."""
  rng = np.random.default_rng(size)
  turn = rng.uniform(0.2, 1.2, (BATCHES, COUNT, 1, 1, 1, 3))
  down, right = np.arange(size)[:, None, None] * SIZE / size, np.arange(size)[:, None] * SIZE / size
  own = np.sin(turn * down + rng.uniform(0, 6, turn.shape)) + np.cos((1.4 - turn) * right)
  return np.float32(own + 0.3 * rng.normal(size=(BATCHES, COUNT, views, size, size, 3)))


def group(image):
  """A group of views [B, V, H, W, C] with all channels."""
  return {'image': jnp.asarray(image), 'channels': jnp.broadcast_to(jnp.arange(3), (*image.shape[:2], 3))}


def weights(params):
  """Every parameter random at the size that keeps activations at 1, so that features differ from the start."""
  rng = np.random.default_rng(3)

  def draw(path, x):
    if path[-1].key in ('mean', 'var'):
      return x
    fan_in = np.prod(x.shape[1:2] if path[1].key == 'transformer' else x.shape[:1])
    return jnp.asarray(rng.normal(size=x.shape) / fan_in**0.5 if path[-1].key == 'kernel' else
                       (path[-1].key == 'scale') + 0.1 * rng.normal(size=x.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, params)


def ours(objective, batches, **options):
  """Takes STEPS steps over the batches in turn: losses, the parameters before, the state after, and its first key."""
  trainer = Trainer(objective, Optimizer(RATE, STEPS, WARMUP, weight_decay=DECAY, **options), AsGiven())
  mesh = mesh_lib.make_mesh({'data': 0})
  batches = jax.device_put(batches, mesh_lib.batch_sharding(mesh))
  abstract = trainer.abstract(batches[0], mesh)
  state = trainer.initialize(abstract, batches[0])
  before = jax.tree.map(np.asarray, weights(state.params))
  target = {k: before[k] for k in state.target}
  where = jax.tree.map(lambda x: x.sharding, abstract)
  state = jax.device_put(dataclasses.replace(state, params=before, target=target), where)
  step, losses = trainer.compile(abstract, batches[0], mesh), []
  for i in range(STEPS):
    state, metrics = step(state, batches[i % BATCHES])
    losses.append(float(metrics['loss']))
  return np.array(losses), before, jax.tree.map(np.asarray, state)


def cosine(start, end, step, steps):
  return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def rate(step, end=0.0):
  return RATE * step / WARMUP if step < WARMUP else cosine(RATE, end, step - WARMUP, STEPS - WARMUP)


def assert_same(have, want):
  """The losses are the same at each step, and have fallen clearly."""
  error = np.abs(have - want) / np.abs(want)
  print(f'loss {want[0]:.4f} -> {want[-1]:.4f}, largest relative difference {error.max():.1e}')
  assert error.max() < BOUND, (int(error.argmax()), error.max())
  assert want[-BATCHES:].mean() < 0.9 * want[:BATCHES].mean()


# PyTorch.


def in_torch(array):
  import torch

  return torch.from_numpy(np.array(array))


def pixels(image):
  """[..., H, W, C] -> [..., C, H, W] in float64."""
  return in_torch(np.moveaxis(np.float64(image), -1, -3))


def vit(model, params, **options):
  """timm's class with these weights, in float64; fixed positions stay fixed."""
  from timm.models.vision_transformer import VisionTransformer

  out = VisionTransformer(SIZE, PATCH, num_classes=0, global_pool='', embed_dim=DIM, depth=DEPTH, num_heads=HEADS,
                          **options)
  out.load_state_dict({k: in_torch(v) for k, v in to_timm(model, params).items()})
  out.pos_embed.requires_grad_(model.pos == 'learned')
  return out.double()


def linear(params):
  """nn.Linear of a dense layer's parameters."""
  from torch import nn

  out = nn.Linear(*params['kernel'].shape, bias='bias' in params)
  out.load_state_dict({k: in_torch(v) for k, v in (('weight', params['kernel'].T), ('bias', params.get('bias')))
                       if v is not None})
  return out.double()


def adamw(module, more=(), betas=(0.9, 0.999)):
  """torch's optimizer with decay on the weights of linear layers and convolutions (and `more`) alone."""
  import torch
  from torch import nn

  decayed = [m.weight for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))] + list(more)
  rest = [p for p in module.parameters() if all(p is not d for d in decayed)]
  groups = [{'params': decayed, 'weight_decay': DECAY}, {'params': rest, 'weight_decay': 0.0}]
  return torch.optim.AdamW(groups, RATE, betas)


def set_rate(optimizer, value):
  for part in optimizer.param_groups:
    part['lr'] = value


def train(optimizer, loss, step):
  """One update at the step's rate; the loss before it."""
  set_rate(optimizer, rate(step))
  optimizer.zero_grad()
  value = loss()
  value.backward()
  optimizer.step()
  return value.item()


def sincos(side, dim):
  """MAE's table [side * side, dim]: half of the features for the column, half for the row, each sines then cosines."""
  omega = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
  row, column = np.divmod(np.arange(side * side), side)
  return np.concatenate([f(x[:, None] * omega) for x in (column, row) for f in (np.sin, np.cos)], axis=1)


def autoencoder(model, params):
  """(image, hidden) -> loss of He et al. 2022, and the module that holds its parameters."""
  import torch
  from timm.models.vision_transformer import Block
  from torch import nn

  decoder, net = params['decoder'], nn.Module()
  wide = decoder['embed']['kernel'].shape[1]
  net.encoder = vit(model, params['encoder'])
  net.embed, net.predict = linear(decoder['embed']), linear(decoder['predict'])
  net.hole = nn.Parameter(in_torch(np.float64(decoder['mask_token'])))
  net.blocks = nn.ModuleList([Block(wide, HEADS, qkv_bias=True) for _ in range(DEPTH)])
  net.norm = nn.LayerNorm(wide, eps=1e-6)
  net.norm.load_state_dict({'weight': in_torch(decoder['norm']['scale']), 'bias': in_torch(decoder['norm']['bias'])})
  blocks = state_dict.write_blocks(decoder['transformer']['blocks'])
  net.blocks.load_state_dict({k.removeprefix('blocks.'): in_torch(v) for k, v in blocks.items()})
  for block in [*net.blocks, *net.encoder.blocks]:
    block.norm1.eps = block.norm2.eps = 1e-6
  side = SIZE // PATCH
  np.testing.assert_allclose(net.encoder.pos_embed[0, 1:].detach().numpy(), sincos(side, DIM), atol=1e-6)
  positions = in_torch(sincos(side, wide))
  net.double()

  def loss(image, hidden):
    count, shown = len(image), (~hidden).nonzero()[:, 1].reshape(len(image), -1)
    at = torch.arange(count)[:, None]
    x = (net.encoder.patch_embed(image) + net.encoder.pos_embed[:, 1:])[at, shown]
    x = torch.cat([net.encoder.cls_token.expand(count, -1, -1), x], dim=1)
    for block in net.encoder.blocks:
      x = block(x)
    x = net.embed(net.encoder.norm(x))
    y = net.hole.expand(count, side * side, -1).clone()
    y[at, shown] = x[:, 1:]
    y = torch.cat([x[:, :1], y + positions], dim=1)
    for block in net.blocks:
      y = block(y)
    patches = image.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [B, C, g, g, p, p]
    patches = patches.permute(0, 2, 3, 4, 5, 1).reshape(count, side * side, -1)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    return (net.predict(net.norm(y))[:, 1:] - target).square().mean(-1)[hidden].mean()

  return loss, net


def test_mae():
  objective = MAE(encoder(**MAE.DEFAULTS['encoder']), decoder_dim=24, decoder_depth=DEPTH, decoder_heads=HEADS)
  data = images(1, SIZE)[:, :, 0]
  batches = [{'image': jnp.asarray(x), 'channels': jnp.tile(jnp.arange(3), (COUNT, 1))} for x in data]
  have, before, state = ours(objective, batches, b2=0.95)

  @jax.jit
  def masks(step):
    """Which tokens are hidden at a step, drawn by the keys that the step derives."""
    loss_key = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.rng), step))[1]
    return objective._mask(jax.random.split(loss_key)[0], batches[0]).hidden > 0

  hidden = [in_torch(masks(i)) for i in range(STEPS)]
  loss, net = autoencoder(objective.encoder, before)
  optimizer = adamw(net, betas=(0.9, 0.95))
  want = [train(optimizer, lambda i=i: loss(pixels(data[i % BATCHES]), hidden[i]), i) for i in range(STEPS)]
  assert_same(have, np.array(want))


def test_simclr():
  import torch
  from torch import nn

  objective = SimCLR(encoder(), temperature=0.2, hidden_dim=24, out_dim=16)
  data = images(2, SIZE)
  have, before, state = ours(objective, [{'global': group(x)} for x in data])
  head = before['projector']
  projector = nn.Sequential(
      linear(head['dense0']), nn.BatchNorm1d(24), nn.ReLU(), linear(head['dense1']), nn.BatchNorm1d(24), nn.ReLU(),
      linear(head['dense2']), nn.BatchNorm1d(16, affine=False)).double()
  for i in (0, 1):
    norm = {'weight': in_torch(head[f'norm{i}']['scale']), 'bias': in_torch(head[f'norm{i}']['bias'])}
    projector[3 * i + 1].load_state_dict(norm, strict=False)
  net = nn.ModuleList([vit(objective.encoder, before['encoder']), projector])
  optimizer = adamw(net)

  def loss(views):
    """NT-Xent (Chen et al. 2020): rows i and i + B are the two views of a sample."""
    z = nn.functional.normalize(projector(net[0](torch.cat([views[:, 0], views[:, 1]]))[:, 0]))
    score = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
    return nn.functional.cross_entropy(score, torch.arange(2 * COUNT).roll(COUNT))

  want = [train(optimizer, lambda i=i: loss(pixels(data[i % BATCHES])), i) for i in range(STEPS)]
  assert_same(have, np.array(want))
  for i, layer in enumerate((1, 4, 7)):
    norm = state.params['projector'][f'norm{i}']
    if i:  # the first norm takes any shift of the features away: its gradient is rounding, which Adam enlarges
      np.testing.assert_allclose(norm['mean'], projector[layer].running_mean, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(norm['var'], projector[layer].running_var, rtol=1e-2, atol=1e-3)


@dataclasses.dataclass
class Student:
  """An encoder and its head in torch: crops [B, V, C, H, W] -> logits [B, V, K]; `last` is [K, bottleneck]."""

  encoder: object
  layers: object
  last: object

  @classmethod
  def load(cls, model, params):
    from torch import nn

    head = params['head']
    layers = nn.Sequential(linear(head['dense0']), nn.GELU(), linear(head['dense1']), nn.GELU(),
                           linear(head['bottleneck']))
    last = nn.Parameter(in_torch(np.float64(head['last']['kernel'].T)))
    return cls(vit(model, params['encoder'], dynamic_img_size=True), layers, last)

  def __call__(self, crops):
    from torch.nn import functional

    x = functional.normalize(self.layers(self.encoder(crops.flatten(0, 1))[:, 0]), dim=-1)
    return (x @ functional.normalize(self.last, dim=-1).T).unflatten(0, crops.shape[:2])

  def parameters(self):
    return [p for p in [*self.encoder.parameters(), *self.layers.parameters(), self.last] if p.requires_grad]


CLIP, FINAL_DECAY, FINAL_RATE = 0.05, 0.4, 1e-5
FROZEN = 5  # steps


def test_dino():
  import torch
  from torch import nn

  objective = DINO(encoder(), clock=Clock(STEPS, 10.0), out_dim=32, hidden_dim=24, bottleneck_dim=12,
                   start_momentum=0.98, start_temperature=0.04, teacher_temperature=0.07)
  big, small = images(2, SIZE), images(2, SIZE // 2)
  batches = [{'global': group(g), 'local': group(s)} for g, s in zip(big, small, strict=True)]
  have, before, state = ours(objective, batches, final_weight_decay=FINAL_DECAY, clip=CLIP, clip_scope='tensor',
                     final_learning_rate=FINAL_RATE)
  student, teacher = (Student.load(objective.encoder, before) for _ in range(2))
  optimizer = adamw(nn.ModuleList([student.encoder, student.layers]), [student.last])
  centre, want = torch.zeros(32, dtype=torch.float64), []
  for i in range(STEPS):
    large, local = pixels(big[i % BATCHES]), pixels(small[i % BATCHES])
    with torch.no_grad():
      target = teacher(large)
      temperature = 0.04 + 0.03 * min(i / 15, 1)  # warm-up of 30 epochs, at most 0.3 of the run
      q = ((target - centre) / temperature).softmax(-1)
      centre = 0.9 * centre + 0.1 * target.mean((0, 1))
    log = (torch.cat([student(large), student(local)], dim=1) / 0.1).log_softmax(-1)
    pairs = [-(q[:, t] * log[:, s]).sum(-1).mean() for t in range(2) for s in range(4) if s != t]
    loss = sum(pairs) / len(pairs)
    want.append(loss.item())
    optimizer.zero_grad()
    loss.backward()
    for p in student.parameters():
      p.grad.mul_(torch.clamp(CLIP / (p.grad.norm() + 1e-6), max=1))
    if i < FROZEN:
      student.last.grad = None
    set_rate(optimizer, rate(i, FINAL_RATE))
    optimizer.param_groups[0]['weight_decay'] = cosine(DECAY, FINAL_DECAY, i, STEPS)
    optimizer.step()
    momentum = cosine(0.98, 1.0, i, STEPS)
    with torch.no_grad():
      for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
        old.mul_(momentum).add_((1 - momentum) * new)
  assert_same(have, np.array(want))
  np.testing.assert_allclose(state.extra['centre'], centre, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(state.target['head']['last']['kernel'].T, teacher.last.detach(), rtol=1e-2, atol=1e-3)


@pytest.fixture(autouse=True)
def one_thread():
  """Tiny products do not gain from more."""
  import torch

  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)
