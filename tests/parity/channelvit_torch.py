"""The forward pass of the official ChannelViT, stated again in torch from its definition, with the same state
dict.

For images [B, C, H, W] and channel ids [B, C]:
1. every channel's p x p patches go through one linear map (kept as a convolution kernel [D, 1, 1, p, p]);
2. the embedding of its channel is added to each token; tokens are channel-major, a class token comes first;
3. positions are added. If the count of patch tokens (over all channels) equals the rows of the table and the
   image is square, the table is added as it is. Otherwise its patch part is resized, bicubic without
   antialiasing, by the scale factors (h + 0.1) / g and (w + 0.1) / g, to h x w tokens, and shared by all
   channels;
4. pre-norm blocks with exact GELU, then a final norm. LayerNorm's epsilon is an argument of the caller.
"""

import torch
import torch.nn.functional as F
from torch import nn


class _Embed(nn.Module):
  def __init__(self, patch_size, in_chans, embed_dim):
    super().__init__()
    self.patch = patch_size
    self.proj = nn.Conv3d(1, embed_dim, (1, patch_size, patch_size), (1, patch_size, patch_size))
    self.channel_embed = nn.Embedding(in_chans, embed_dim)

  def forward(self, images, ids):
    batch, count, height, width = images.shape
    flat = images.reshape(batch * count, 1, height, width)
    cut = F.unfold(flat, self.patch, stride=self.patch)  # [BC, pp, N]
    tokens = cut.transpose(1, 2) @ self.proj.weight.flatten(1).T + self.proj.bias
    tokens = tokens.reshape(batch, count, -1, tokens.shape[-1]) + self.channel_embed(ids)[:, :, None]
    return tokens.flatten(1, 2)


class _Attention(nn.Module):
  def __init__(self, dim, heads, bias):
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(dim, 3 * dim, bias)
    self.proj = nn.Linear(dim, dim)

  def forward(self, x):
    q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
    weights = torch.softmax(torch.matmul(q, k.mT) / q.shape[-1] ** 0.5, dim=-1)
    return self.proj(torch.matmul(weights, v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
  def __init__(self, dim, hidden):
    super().__init__()
    self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

  def forward(self, x):
    x = self.fc1(x)
    return self.fc2(x * 0.5 * (1 + torch.erf(x / 2**0.5)))


class _Block(nn.Module):
  def __init__(self, dim, heads, ratio, bias, norm_layer):
    super().__init__()
    self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
    self.attn = _Attention(dim, heads, bias)
    self.mlp = _MLP(dim, int(dim * ratio))

  def forward(self, x):
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class ChannelVisionTransformer(nn.Module):
  """`forward(images, {'channels': ids})` -> class token [B, D]; `tokens` -> all tokens [B, 1 + C * N, D]."""

  def __init__(
    self,
    img_size=(224,),
    patch_size=16,
    in_chans=3,
    embed_dim=768,
    depth=12,
    num_heads=12,
    mlp_ratio=4.0,
    qkv_bias=False,
    norm_layer=nn.LayerNorm,
    enable_sample=True,
  ):
    super().__init__()
    del enable_sample  # channels are sampled in training only
    self.grid = img_size[0] // patch_size
    self.patch_embed = _Embed(patch_size, in_chans, embed_dim)
    self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
    self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + self.grid**2, embed_dim))
    self.blocks = nn.ModuleList(
      _Block(embed_dim, num_heads, mlp_ratio, qkv_bias, norm_layer) for _ in range(depth)
    )
    self.norm = norm_layer(embed_dim)

  def positions(self, count, height, width):
    """Positions [1, 1 + C * N, D] for `count` channels of an image of this size in pixels."""
    start, table = self.pos_embed[:, :1], self.pos_embed[:, 1:]
    high, wide = height // self.patch_embed.patch, width // self.patch_embed.patch
    if count * high * wide == self.grid**2 and height == width:
      return self.pos_embed
    image = table.mT.unflatten(-1, (self.grid, self.grid))  # [1, D, g, g]
    scale = ((high + 0.1) / self.grid, (wide + 0.1) / self.grid)
    image = F.interpolate(image, scale_factor=scale, mode='bicubic')
    assert image.shape[2:] == (high, wide)
    return torch.cat([start, image.flatten(2).mT.repeat(1, count, 1)], dim=1)

  def tokens(self, images, ids):
    x = self.patch_embed(images, ids)
    x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
    x = x + self.positions(*images.shape[1:])
    for block in self.blocks:
      x = block(x)
    return self.norm(x)

  def forward(self, images, extra_tokens):
    return self.tokens(images, extra_tokens['channels'])[:, 0]
