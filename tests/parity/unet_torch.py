"""U-Nets restated in PyTorch, with the names of their tensors as published, to compare with.

Written from the definitions: nnU-Net's PlainConvUNet and ResidualEncoderUNet (dynamic-network-architectures 0.4.4) and
STU-Net (uni-medical/STU-Net). Their aliases of layers (`all_modules`, `decoder.encoder`) are here too.
"""

import torch
from torch import nn
from torch.nn import functional as F


def norm(dim):
  return nn.InstanceNorm3d(dim, eps=1e-5, affine=True)


class Layer(nn.Module):
  """Convolution and norm, with or without activation; each under two names."""

  def __init__(self, inward, outward, kernel, stride=(1, 1, 1), act=True, bias=True):
    super().__init__()
    self.conv = nn.Conv3d(inward, outward, kernel, stride, [(k - 1) // 2 for k in kernel], bias=bias)
    self.norm = norm(outward)
    self.all_modules = nn.Sequential(self.conv, self.norm)
    self.act = act

  def forward(self, x):
    x = self.norm(self.conv(x))
    return F.leaky_relu(x, 0.01) if self.act else x


class Layers(nn.Module):
  def __init__(self, layers):
    super().__init__()
    self.convs = nn.Sequential(*layers)

  def forward(self, x):
    return self.convs(x)


class BlockD(nn.Module):
  def __init__(self, inward, outward, kernel, stride):
    super().__init__()
    self.conv1, self.conv2 = Layer(inward, outward, kernel, stride), Layer(outward, outward, kernel, act=False)
    parts = [nn.AvgPool3d(stride, stride)] if max(stride) > 1 else []
    if inward != outward:
      parts.append(Layer(inward, outward, (1, 1, 1), act=False, bias=False))
    self.skip = nn.Sequential(*parts)

  def forward(self, x):
    return F.leaky_relu(self.conv2(self.conv1(x)) + self.skip(x), 0.01)


class Blocks(nn.Module):
  def __init__(self, blocks):
    super().__init__()
    self.blocks = nn.Sequential(*blocks)

  def forward(self, x):
    return self.blocks(x)


class Encoder(nn.Module):
  def __init__(self, channels, dims, depths, kernels, strides, residual, stem):
    super().__init__()
    if residual:
      self.stem = Layers([Layer(channels, stem, kernels[0])])
    inward, stages = stem if residual else channels, []
    for dim, depth, kernel, stride in zip(dims, depths, kernels, strides, strict=True):
      make = BlockD if residual else Layer
      some = [make(inward if j == 0 else dim, dim, kernel, stride if j == 0 else (1, 1, 1)) for j in range(depth)]
      stages.append(Blocks(some) if residual else nn.Sequential(Layers(some)))
      inward = dim
    self.stages = nn.Sequential(*stages)

  def forward(self, x):
    x, maps = self.stem(x) if hasattr(self, 'stem') else x, []
    for stage in self.stages:
      x = stage(x)
      maps.append(x)
    return maps


class Decoder(nn.Module):
  def __init__(self, encoder, dims, kernels, strides, depth, classes):
    super().__init__()
    self.encoder = encoder
    pairs = [(dims[i], dims[i + 1], kernels[i], strides[i + 1]) for i in reversed(range(len(dims) - 1))]
    self.stages = nn.ModuleList(Layers([Layer(2 * fine if j == 0 else fine, fine, k) for j in range(depth)])
                                for fine, _, k, _ in pairs)
    self.transpconvs = nn.ModuleList(nn.ConvTranspose3d(coarse, fine, s, s) for fine, coarse, _, s in pairs)
    self.seg_layers = nn.ModuleList(nn.Conv3d(fine, classes, 1) for fine, *_ in pairs)

  def forward(self, maps):
    x, outs = maps[-1], []
    for up, stage, head, skip in zip(self.transpconvs, self.stages, self.seg_layers, maps[-2::-1], strict=True):
      x = stage(torch.cat([up(x), skip], 1))
      outs.append(head(x))
    return outs[::-1]


class NNUNet(nn.Module):
  def __init__(self, channels, classes, dims, depths, kernels, strides, residual, stem=0):
    super().__init__()
    self.encoder = Encoder(channels, dims, depths, kernels, strides, residual, stem)
    self.decoder = Decoder(self.encoder, dims, kernels, strides, 1 if residual else 2, classes)

  def forward(self, x):
    return self.decoder(self.encoder(x))


class Residual(nn.Module):
  def __init__(self, inward, outward, kernel, stride=(1, 1, 1), shortcut=False):
    super().__init__()
    pad = [k // 2 for k in kernel]
    self.conv1, self.norm1 = nn.Conv3d(inward, outward, kernel, stride, pad), norm(outward)
    self.conv2, self.norm2 = nn.Conv3d(outward, outward, kernel, 1, pad), norm(outward)
    self.conv3 = nn.Conv3d(inward, outward, 1, stride) if shortcut else None

  def forward(self, x):
    y = self.norm2(self.conv2(F.leaky_relu(self.norm1(self.conv1(x)), 0.01)))
    return F.leaky_relu(y + (self.conv3(x) if self.conv3 is not None else x), 0.01)


class Nearest(nn.Module):
  def __init__(self, inward, outward, factor):
    super().__init__()
    self.conv, self.factor = nn.Conv3d(inward, outward, 1), factor

  def forward(self, x):
    return self.conv(F.interpolate(x, scale_factor=self.factor, mode='nearest'))


class STUNet(nn.Module):
  def __init__(self, channels, classes, dims, depths, kernels, strides):
    super().__init__()

    def stage(inward, i, stride):
      rest = [Residual(dims[i], dims[i], kernels[i]) for _ in range(depths[i] - 1)]
      return nn.Sequential(Residual(inward, dims[i], kernels[i], stride, True), *rest)

    inward = (channels, *dims)
    self.conv_blocks_context = nn.ModuleList(stage(inward[i], i, strides[i]) for i in range(len(dims)))
    order = list(reversed(range(len(dims) - 1)))
    self.upsample_layers = nn.ModuleList(Nearest(dims[i + 1], dims[i], strides[i + 1]) for i in order)
    self.conv_blocks_localization = nn.ModuleList(stage(2 * dims[i], i, (1, 1, 1)) for i in order)
    self.seg_outputs = nn.ModuleList(nn.Conv3d(dims[i], classes, 1) for i in order)

  def forward(self, x):
    maps = []
    for stage in self.conv_blocks_context:
      x = stage(x)
      maps.append(x)
    outs = []
    for up, stage, head, skip in zip(self.upsample_layers, self.conv_blocks_localization, self.seg_outputs,
                                     maps[-2::-1], strict=True):
      x = stage(torch.cat([up(x), skip], 1))
      outs.append(head(x))
    return outs[::-1]
