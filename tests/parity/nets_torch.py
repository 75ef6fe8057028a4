"""D-Former, SWTR-Unet and multi-scale self-guided attention again, in PyTorch, on parameters of ours by their paths."""

import itertools
import math

import flax.traverse_util
import numpy as np
import torch
import torch.nn.functional as F


class Weights:
  """Tensors of a tree of parameters under a path, in PyTorch's layouts, float64."""

  def __init__(self, tree, scope='', block=None):
    self.flat = tree if '' in tree else {'': None} | {
        '/'.join(k): torch.from_numpy(np.array(v, np.float64)) for k, v in flax.traverse_util.flatten_dict(tree).items()}
    self.scope, self.block = scope, block

  def at(self, name, block=None):
    return Weights(self.flat, f'{self.scope}{name}/', self.block if block is None else block)

  def get(self, leaf):
    value = self.flat.get(self.scope + leaf)
    return value if value is None or self.block is None else value[self.block]

  def linear(self, x):
    """Of the last axis of x, with a kernel [D, *features] whose features are laid side by side."""
    kernel, bias = self.get('kernel'), self.get('bias')
    kernel = kernel.reshape(x.shape[-1], -1)
    return x @ kernel if bias is None else x @ kernel + bias.reshape(-1)

  def layer_norm(self, x):
    return F.layer_norm(x, x.shape[-1:], self.get('scale'), self.get('bias'), 1e-5)

  def conv(self, x, stride=1, padding=0, groups=1):
    """Of x [B, C, *size]."""
    kernel = self.get('kernel')
    rank = kernel.ndim - 2
    weight = kernel.permute(rank + 1, rank, *range(rank))
    return (F.conv2d if rank == 2 else F.conv3d)(x, weight, self.get('bias'), stride, padding, 1, groups)

  def batch_norm(self, x, train):
    mean, var = self.get('mean').clone(), self.get('var').clone()
    return F.batch_norm(x, mean, var, self.get('scale'), self.get('bias'), train, 0.1, 1e-5)


def first(x):
  """[B, *size, C] -> [B, C, *size]."""
  return x.movedim(-1, 1)


def last(x):
  return x.movedim(1, -1)


def attend(w, x, heads, mask):
  """Self-attention of x [B, N, D] among the pairs of `mask` [N, N]."""
  batch, count, dim = x.shape
  q, k, v = w.at('qkv').linear(x).reshape(batch, count, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
  out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
  return w.at('proj').linear(out.transpose(1, 2).reshape(batch, count, dim))


# D-Former: every block as attention among all places, with a mask of the pairs that share a group.


def groups(size, group, dilated):
  """[N, N] bool."""
  if min(n - g for n, g in zip(size[-2:], group[-2:])) < 0:
    return torch.ones(math.prod(size), math.prod(size), dtype=torch.bool)
  places = torch.tensor(list(itertools.product(*map(range, size))))
  own = torch.tensor([min(n, g) for n, g in zip(size, group)])
  steps = torch.tensor([math.ceil(n / g) for n, g in zip(size, own.tolist())])
  label = places % steps if dilated else places // own
  return (label[:, None] == label[None]).all(-1)


def dformer_stage(w, name, x, heads, group, depth):
  conv = w.at(f'{name}_pos').get('kernel')
  x = x + last(F.conv3d(first(x), conv.permute(4, 3, 0, 1, 2), w.at(f'{name}_pos').get('bias'), 1, 1, 1, x.shape[-1]))
  size, blocks = x.shape[1:-1], w.at(name).at('blocks')
  x = x.flatten(1, -2)
  for i in range(depth):
    block = Weights(w.flat, blocks.scope, i)
    x = x + attend(block.at('attn'), block.at('norm1').layer_norm(x), heads, groups(size, group, i % 2 == 1))
    y = block.at('fc1').linear(block.at('norm2').layer_norm(x))
    x = x + block.at('fc2').linear(F.gelu(y))
  return x.unflatten(1, size)


def expanded(w, x, factor):
  """Blocks of `factor` places of each place, by a loop over the places of a block."""
  x = w.at('expand').linear(x)
  size = [n * f for n, f in zip(x.shape[1:-1], factor)]
  parts = x.chunk(math.prod(factor), -1)
  out = x.new_zeros(x.shape[0], *size, parts[0].shape[-1])
  for part, corner in zip(parts, itertools.product(*map(range, factor))):
    out[(slice(None), *(slice(c, None, f) for c, f in zip(corner, factor)))] = part
  return w.at('norm').layer_norm(out)


def dformer(params, image, depths, heads, patch, group):
  """Logits of all outputs, the finest first."""
  encoder, decoder = Weights(params['encoder']), Weights(params['decoder'])
  x = encoder.at('stem_norm').layer_norm(last(encoder.at('stem_conv').conv(first(image), patch)))
  inputs = []
  for i, depth in enumerate(depths):
    if i:
      eight = [x[:, a::2, b::2, c::2] for a in (0, 1) for b in (0, 1) for c in (0, 1)]
      x = encoder.at(f'down{i}_reduction').linear(encoder.at(f'down{i}_norm').layer_norm(torch.cat(eight, -1)))
    inputs.append(x)
    x = dformer_stage(encoder, f'stage{i}', x, heads[i], group, depth)
  x, outs = encoder.at('norm').layer_norm(x), []
  head = lambda x, i: decoder.at(f'head{i}').linear(expanded(decoder.at(f'head{i}_up'), x, patch))
  for i in reversed(range(len(depths) - 1)):
    x = expanded(decoder.at(f'up{i}'), x, (2, 2, 2))
    if i:
      outs.insert(0, head(x, i))
    x = decoder.at(f'fuse{i}').linear(torch.cat([x, inputs[i]], -1))
    x = dformer_stage(decoder, f'stage{i}', x, heads[i], group, depths[i])
  return [head(decoder.at('norm').layer_norm(x), 0), *outs]


# SWTR-Unet: a ResNet of basic blocks, Swin's blocks at its end, a U-Net's decoder.


def basic_block(w, x, stride):
  y = F.relu(w.at('bn1').batch_norm(w.at('conv1').conv(x, stride, 1), False))
  y = w.at('bn2').batch_norm(w.at('conv2').conv(y, 1, 1), False)
  if w.at('down_conv').get('kernel') is not None:
    x = w.at('down_bn').batch_norm(w.at('down_conv').conv(x, stride), False)
  return F.relu(x + y)


def swin_mask(size, window, shift):
  """[N, N] bool: pairs of a window that is `shift` places further on, without wrapping."""
  places = torch.tensor(list(itertools.product(*map(range, size))))
  label = torch.div(places - shift, window, rounding_mode='floor')
  return (label[:, None] == label[None]).all(-1)


def swin_block(w, x, heads, window, shifted):
  """Of x [B, H, W, D], whose sides are larger than the window."""
  size, dim = x.shape[1:-1], x.shape[-1]
  x = x.flatten(1, 2)
  places = torch.tensor(list(itertools.product(*map(range, size))))
  apart = (places[:, None] - places[None] + window - 1).clamp(0, 2 * window - 2)  # beyond, the mask hides it
  bias = w.at('attn').get('bias_table')[apart[..., 0] * (2 * window - 1) + apart[..., 1]].permute(2, 0, 1)
  mask = swin_mask(size, window, window // 2 if shifted else 0)
  x = x + attend(w.at('attn'), w.at('norm1').layer_norm(x), heads, bias.masked_fill(~mask, -math.inf))
  y = w.at('fc2').linear(F.gelu(w.at('fc1').linear(w.at('norm2').layer_norm(x))))
  return (x + y).reshape(-1, *size, dim)


def swtr_unet(params, image, depths, heads, window, blocks):
  """Logits of the encoder without a max-pool and the decoder `unet`."""
  encoder, decoder = Weights(params['encoder']), Weights(params['decoder'])
  x, maps = F.relu(encoder.at('bn1').batch_norm(encoder.at('conv1').conv(first(image), 2, 1), False)), []
  for i, depth in enumerate(depths, 1):
    for j in range(depth):
      x = basic_block(encoder.at(f'layer{i}_{j}'), x, 2 if i > 1 and j == 0 else 1)
    maps.append(x)
  x = last(x)
  for i in range(blocks):
    x = swin_block(Weights(encoder.flat, 'transformer/blocks/', i), x, heads, window, i % 2 == 1)
  x = first(encoder.at('norm').layer_norm(x))

  def up(x, name):
    kernel = decoder.at(name).get('kernel')
    return F.conv_transpose2d(x, kernel.permute(2, 3, 0, 1), decoder.at(name).get('bias'), 2)

  def stage(x, name, depth):
    for j in range(depth):
      w = decoder.at(f'{name}_{j}')
      x = F.relu(w.at('norm').batch_norm(w.at('conv').conv(x, 1, 1), False))
    return x

  for i in reversed(range(len(depths) - 1)):
    x = stage(torch.cat([up(x, f'up{i + 1}'), maps[i]], 1), f'stage{i + 1}', 2)
  x = stage(up(x, 'up_fine1'), 'stage_fine1', 2)
  return last(decoder.at('head_fine1').conv(x))


# Multi-scale self-guided attention, in training.


def unit(w, x, padding=1, relu=False):
  x = w.at('norm').batch_norm(w.at('conv').conv(x, 1, padding), True)
  return F.relu(x) if relu else F.prelu(x, w.get('slope'))


def enlarged(w, x):
  return F.conv_transpose2d(x, w.get('kernel').permute(2, 3, 0, 1), w.get('bias'), 2)


def autoencoder(w, x):
  for name in ('enc1', 'enc2'):
    x = F.max_pool2d(unit(w.at(f'{name}_1'), unit(w.at(f'{name}_0'), x, relu=True), relu=True), 2)
  code = x
  for name in ('2', '1'):
    x = unit(w.at(f'dec{name}_1'), unit(w.at(f'dec{name}_0'), x, relu=True), relu=True)
    x = enlarged(w.at(f'up{name}'), x)
  return code, x


def over_places(w, x):
  q, k, v = (w.at(name).conv(x).flatten(2) for name in 'qkv')
  weights = torch.softmax(q.transpose(1, 2) @ k, -1)  # [B, query, key], no scale
  return w.get('gamma') * (v @ weights.transpose(1, 2)).reshape(x.shape) + x


def over_channels(w, x):
  flat = x.flatten(2)
  energy = flat @ flat.transpose(1, 2)
  weights = torch.softmax(energy.amax(-1, keepdim=True) - energy, -1)
  return w.get('gamma') * (weights @ flat).reshape(x.shape) + x


def msa(params, maps, size):
  """(logits of the mean of the second round, of each scale of the first round and of the second; the terms of the loss:
  codes, reconstructions), of maps [B, *grid, D], the finest first."""
  w, mse = Weights(params), F.mse_loss
  grid = maps[0].shape[1:-1]
  large = lambda x, size: F.interpolate(x, size, mode='bilinear', align_corners=False)
  down = [large(unit(w.at(f'down{i}'), first(x), 0), grid) for i, x in enumerate(maps)]
  fused = torch.cat(down[::-1], 1)
  for i, padding in enumerate((1, 1, 0)):
    fused = unit(w.at(f'fuse{i}'), fused, padding)

  def seen(pair, turn, i):
    code, made = autoencoder(w.at(f'semantic{turn}'), pair)
    both = 0
    for kind, attention in (('places', over_places), ('channels', over_channels)):
      own = w.at(f'{kind}{turn}_{i}')
      both = both + unit(own.at('after'), attention(own, unit(own.at('before'), pair)))
    both = w.at(f'mix{turn}_{i}').conv(both * w.at(f'weigh{turn}_{i}').conv(made, 1, 1))
    return code, mse(made, pair), both

  one = [seen(torch.cat([x, fused], 1), 1, i) for i, x in enumerate(down)]
  two = [seen(torch.cat([x, found * fused], 1), 2, i) for i, (x, (_, _, found)) in enumerate(zip(down, one))]
  codes = sum(mse(a[0], b[0]) for a, b in zip(one, two))
  made = sum(x[1] for x in (*one, *two))
  out = lambda x, name: last(large(w.at(name).conv(x), size))
  first_round = [out(x, f'out1_{i}') for i, x in enumerate(down)]
  second = [out(x[2], f'out2_{i}') for i, x in enumerate(two)]
  return [sum(second) / len(second), *first_round, *second], float(codes), float(made)
