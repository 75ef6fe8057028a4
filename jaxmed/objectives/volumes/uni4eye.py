"""Uni4Eye: images and volumes masked in one transformer, with pixels and gradients as targets (Cai et al. 2022, MICCAI,
arXiv 2203.04614; Uni4Eye++, IEEE TMI 2024)."""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError
from jaxmed.models.decoders.mae import Decoder
from jaxmed.models.layers import initial
from jaxmed.models.layers.positions import coordinates, inside, own_coordinates, sincos
from jaxmed.models.layers.tokens import Tokens, grid_of, patchify, without_missing
from jaxmed.models.layers.transformer import Dense
from jaxmed.objectives import networks
from jaxmed.objectives.base import Method
from jaxmed.objectives.masked.mae import mean_of, normalised
from jaxmed.objectives.networks import with_stats

TARGETS = ('image', 'gradient')
VOLUME = 'volume'  # the tower that is the encoder of volumes


@dataclasses.dataclass(frozen=True)
class Uni4Eye(Method):
  """Hides tokens of images and of volumes, and reconstructs their pixels and the strength of their edges.

  A sample is a window of slices (`loader.window` records of one `loader.window_group`, in order): of several slices it
  is a volume, of one, as an image of no volume is, it is an image. A batch holds both. Images become tokens by the
  encoder's own kernel, volumes by a kernel of `patch_slices` slices; blocks, class token and decoders are shared. The
  tokens of an image are those of the first layer of a volume, with the same positions; a deeper layer has a vector of
  its depth added. Two decoders reconstruct what is hidden: the pixels, and their gradients, both normalised by patch.
  The products are the encoder of images, and as tower 'volume' the same with the kernel and the positions of volumes.

  Hidden are ceil(mask_ratio N) of a sample's N tokens, but one is shown. With `guided`, noise is multiplied by the
  entropy of the patch before the largest are hidden (Uni4Eye++), so that hidden patches have structure.

  Differs from the code (Davidczy/Uni4Eye_pp), by what the papers mean: volumes are volumes (there arrays of three
  slices, which its 2D kernel embeds) and have positions (there zeros); the Sobel maps of all three axes stay floats
  (there integers, of which some 25 are left); entropies are of 8-bit intensities and normalised in each sample (there
  all zero, in bins of width 1, and normalised for the last sample of a batch); a patch of a volume has the pixels of
  all its slices. By choice: images and volumes in one batch, where the code has an epoch of each in turn; gradients of
  each channel, not of gray; no head whose weights are made from the modality (++), which is tied to 196 tokens.

  Attributes:
    mask_ratio: share of a sample's tokens that is hidden.
    guided: whether entropy guides what is hidden.
    gradient_weight: of the loss of gradients beside that of pixels.
    patch_slices: slices of a patch of a volume; a divisor of loader.window. The last slice stands for those that a
      volume has not.
    inflated: whether the kernel of volumes begins as the encoder's, spread over the slices, or as random as that.
    decoder_dim, decoder_depth, decoder_heads: of both decoders; 0 as of MAE.
    window: slices of a sample; the run fills it in.
  """

  encoder: Encoder
  mask_ratio: float = 0.5
  guided: bool = True
  gradient_weight: float = 1.0
  patch_slices: int = 16
  inflated: bool = False
  decoder_dim: int = 0
  decoder_depth: int = 0
  decoder_heads: int = 0
  window: int = 0

  LEARNING_RATE: ClassVar = (2.4e-3, 4096)  # as of MAE
  FEATURE: ClassVar[str] = 'mean'
  WINDOWS: ClassVar[bool] = True
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'encoder': {'pos': 'sincos', 'kernel_init': 'xavier_uniform', 'patch_init': 'torch_bias'},
      'optimizer': {'b2': 0.95, 'weight_decay': 0.05},
      'augment': {'scale': (0.2, 1.0)},
      'loader': {'window': 32, 'window_group': 'path', 'window_order': 'id'},
  }

  def __post_init__(self):
    if not 0 < self.mask_ratio < 1:
      raise UserError(f'objective.mask_ratio {self.mask_ratio} must lie between 0 and 1')
    if self.gradient_weight < 0 or self.patch_slices < 1:
      raise UserError(f'objective.gradient_weight {self.gradient_weight} must be at least 0, and patch_slices '
                      f'{self.patch_slices} at least 1')
    dim, _, heads = self._decoder_size
    if dim % heads:
      raise UserError(f'objective.decoder_heads {heads} does not divide decoder_dim {dim}')

  @property
  def _decoder_size(self) -> tuple[int, int, int]:
    width = self.encoder.embed_dim
    dim = self.decoder_dim or min(width, 512)
    return dim, self.decoder_depth or (8 if width >= 768 else 4 if width >= 384 else 2), self.decoder_heads or max(
        dim // 32, 1)

  @property
  def _patch(self) -> tuple[int, ...]:
    return (self.patch_slices, *self.encoder.patch_size)

  @property
  def _pixels(self) -> tuple[int, int]:
    """Numbers of a patch of a volume and of an image, as a token has them."""
    flat = math.prod(self.encoder.patch_size) * (1 if self.encoder.per_channel else self.encoder.in_channels)
    return self.patch_slices * flat, flat

  @property
  def volume_embed(self) -> Dense:
    """The kernel of volumes."""
    e = self.encoder
    options: Any = {k: getattr(e, k, '') for k in ('patch_init', 'kernel_init')}
    kernel, bias = initial.patch_laws(options['patch_init'], options['kernel_init'] or 'trunc_normal', self._pixels[0])
    return Dense((e.embed_dim,), ('patch', 'embed'), True, kernel, jnp.dtype(e.dtype), bias_init=bias)

  def decoder(self, slices: int) -> Decoder:
    """The decoder of windows of so many slices; its outputs are the pixels of a volume's patch, then of an image's."""
    e, (dim, depth, heads) = self.encoder, self._decoder_size
    grid = (slices // self.patch_slices, *grid_of(e.image_size, e.patch_size))
    return Decoder(grid, sum(self._pixels), e.in_channels if e.per_channel else 0, dim, depth, heads, remat=e.remat,
                   dtype=e.dtype)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of windows."""
    self._check(batch)
    keys, slices = jax.random.split(rng, 4), batch['image'].shape[1]
    known: Any = networks.inputs(batch)
    image = {name: x[:1, 0] for name, x in known.items()}
    encoder = self.encoder.init(keys[0], **image)['params']
    volume = self.volume_embed.init(keys[1], jnp.zeros((1, self._pixels[0])))['params']
    if self.inflated:
      spread = lambda x: jnp.tile(x, (self.patch_slices, 1)) / self.patch_slices
      own = nn.unbox(encoder['patch_embed'])
      volume = {'kernel': volume['kernel'].replace_boxed(spread(own['kernel'])),
                'bias': volume['bias'].replace_boxed(own['bias'])}
    params = {'encoder': encoder, 'volume_embed': volume}
    tokens = math.prod(self.decoder(slices).grid) * (batch['image'].shape[-1] if self.encoder.per_channel else 1)
    shown, prefix = self._most(tokens), jnp.zeros((1, self.encoder.embed_dim)) if self.encoder.class_token else None
    for key, name in zip(keys[2:], TARGETS, strict=True):
      params[f'{name}_decoder'] = self.decoder(slices).init(
          key, prefix, jnp.zeros((1, shown, self.encoder.embed_dim)), jnp.ones((1, shown), bool),
          jnp.zeros((1, tokens), jnp.int32), batch['channels'][:1, 0], jnp.ones((1, tokens), bool))['params']
    return {'params': params, 'target': {}, 'extra': {}}

  def model_of(self, tower: str) -> Any:
    """The encoder of images, or that of volumes, which holds its positions as a table."""
    e: Any = self.encoder
    if tower != VOLUME:
      return e
    return e.clone(image_size=(self.window, *e.image_size), patch_size=self._patch, pos='learned',
                   no_embed_class=e.no_embed_class or e.pos != 'learned', pos_interpolation='antialias')

  def products(self, variables: Variables) -> dict[str, Any]:
    """The weights of the encoder of images and, where its positions are added to tokens, of that of volumes."""
    params, e = variables['params'], self.model_of('image')
    found = {self.TOWERS[0]: params['encoder']}
    if e.pos == 'rope' or self.window < self.patch_slices:
      return found
    table = self._places(params, grid_of(e.image_size, e.patch_size), self.window // self.patch_slices, None, None)
    table = table.reshape(-1, e.embed_dim)
    if e.pos == 'learned' and not e.no_embed_class:
      table = jnp.concatenate([params['encoder']['pos_embed'][: e.num_prefix_tokens], table])
    return found | {VOLUME: params['encoder'] | {'patch_embed': params['volume_embed'], 'pos_embed': table}}

  def _check(self, batch: Batch) -> None:
    e = self.encoder
    if not e.supports.embed_patches or e.supports.concatenated:
      raise UserError('method uni4eye hides tokens of one transformer for images and volumes: it needs a vit or a '
                      'channel_vit')
    if batch['image'].ndim != len(e.image_size) + 3 or len(e.image_size) != 2:
      raise UserError('method uni4eye takes windows of slices: set loader.window to the slices of a sample and '
                      'loader.window_group to the column that says which volume they are of')
    if batch['image'].shape[1] % self.patch_slices:
      raise UserError(f'loader.window={batch["image"].shape[1]} does not divide into objective.patch_slices='
                      f'{self.patch_slices}')

  def _most(self, tokens: int) -> int:
    """How many of its tokens a sample shows, one or more."""
    return max(tokens - math.ceil(self.mask_ratio * tokens - 1e-9), 1)

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Mean squared error over the hidden tokens of the global batch, of pixels and of gradients."""
    del step
    self._check(batch)
    params, e = variables['params'], self.encoder
    noise_key, drop_key = jax.random.split(rng)
    image, there, flat = self._volume(batch)
    channels = batch['channels'][:, 0]
    tokens = self._tokens(params, image, batch, there, flat)
    score = jax.random.uniform(noise_key, there.shape)
    score = score * self._entropy(image, there) if self.guided else score
    own = there.sum(axis=1, keepdims=True)
    ids_shuffle = jnp.argsort(jnp.where(there, score, 2.0), axis=1)  # the last ones are hidden
    ids_restore, most = jnp.argsort(ids_shuffle, axis=1), self._most(there.shape[1])
    table = jnp.asarray([0, *map(self._most, range(1, there.shape[1] + 1))])
    ids_keep, visible = ids_shuffle[:, :most], jnp.arange(most) < table[own]
    hidden = (ids_restore >= table[own]) & there
    shown = dataclasses.replace(tokens.take(ids_keep), valid=visible)
    latent = e.apply({'params': params['encoder']}, shown, train, method='encode', rngs={'dropout': drop_key})
    loss, metrics = jnp.zeros(()), {'hidden_tokens': hidden.sum(axis=1).mean(), 'images': flat.mean()}
    for name, weight in zip(TARGETS, (1.0, self.gradient_weight), strict=True):
      if not weight:
        continue
      found = self.decoder(image.shape[1]).apply({'params': params[f'{name}_decoder']}, latent.cls, latent.patches,
                                                 visible, ids_restore, channels, there)
      target = image if name == 'image' else sobel(image)
      error, plain = self._errors(found.astype(jnp.float32), jax.lax.stop_gradient(target), batch, flat)
      over = lambda x: (x * hidden).sum() / jnp.maximum(hidden.sum(), 1)
      loss = loss + weight * over(error)
      metrics |= {f'{name}_loss': over(error), f'{name}_gain': 1 - over(error) / jnp.maximum(over(plain), 1e-6)}
    return loss, (with_stats(metrics, train), variables['extra'])

  def _volume(self, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Volumes [B, K, H, W, C] without what is not there, their tokens that are [B, N], and which are images [B]."""
    e, real = self.encoder, batch['index'] >= 0  # [B, K]
    image = networks.last_again(batch['image'].astype(jnp.float32), real)
    grid = grid_of(image.shape[2:-1], e.patch_size)
    layers = real.reshape(len(real), -1, self.patch_slices).any(axis=2)  # [B, K / patch_slices]
    cells = jnp.ones((len(real), 1, math.prod(grid)), bool)
    if 'sizes' in batch:
      sizes = batch['sizes'][:, 0]
      within = inside(sizes, image.shape[2:-1]).reshape(len(image), 1, *image.shape[2:-1], 1)
      image, cells = jnp.where(within, image, 0), inside(sizes // jnp.asarray(e.patch_size), grid)[:, None]
    mask = batch.get('channel_mask')
    if mask is not None:
      image = without_missing(image, mask[:, 0])
    there = (layers[..., None] & cells).reshape(len(real), 1, -1)
    if e.per_channel:
      known = jnp.ones((len(image), image.shape[-1]), bool) if mask is None else mask[:, 0]
      there = there & known[..., None]
    return image, there.reshape(len(real), -1), real.sum(axis=1) == 1

  def _tokens(self, params: Any, image: jax.Array, batch: Batch, there: jax.Array, flat: jax.Array) -> Tokens:
    """Embedded patches [B, N, D] of volumes, or of images in the places of the first layer."""
    e, mask = self.encoder, None if 'channel_mask' not in batch else batch['channel_mask'][:, 0]
    known: Any = networks.inputs(batch)
    one = {name: x[:, 0] for name, x in known.items()} | {'image': image[:, 0]}
    call = lambda method, *args, **known: e.apply({'params': params['encoder']}, *args, method=method, **known)
    plane, grid = call('embed_patches', **one), grid_of(image.shape[2:-1], e.patch_size)
    if mask is not None and not e.per_channel:  # as a ViT does: more of those that are there
      image = image * (mask.shape[1] / jnp.maximum(mask.sum(axis=1), 1)).reshape(-1, 1, 1, 1, 1)
    pixels = patchify(image, self._patch, e.per_channel)
    pixels = pixels if e.per_channel else pixels[:, None]  # [B, G, N, P], of G channels
    own = None if 'sizes' not in batch else batch['sizes'][:, 0] // jnp.asarray(e.patch_size)
    x = self.volume_embed.apply({'params': params['volume_embed']}, pixels)  # [B, G, N, D]
    layers, groups = x.shape[2] // math.prod(grid), x.shape[1]
    x = x + self._places(params, grid, layers, mask, own, groups).astype(x.dtype)
    if e.per_channel:
      x = x + call('channel_vectors')[batch['channels'][:, 0]][:, :, None].astype(x.dtype)
    plane_x = plane.x.reshape(len(x), groups, -1, e.embed_dim)
    plane_x = jnp.pad(plane_x, ((0, 0), (0, 0), (0, x.shape[2] - plane_x.shape[2]), (0, 0)))
    x = jnp.where(flat[:, None, None, None], plane_x, x).reshape(len(x), -1, e.embed_dim)
    where = None
    if plane.position is not None:
      each = jnp.asarray(coordinates(grid))[None] if own is None else own_coordinates(own, grid)
      where = jnp.tile(each, (1, layers * groups, 1))
    return Tokens(x, there, where)

  def _places(self, params: Any, grid: tuple[int, ...], layers: int, mask: jax.Array | None, own: jax.Array | None,
              groups: int = 2) -> jax.Array:
    """Positions [1 or B, 1, N, D] of the patches of volumes: those of an image, and the depth of each layer."""
    e = self.encoder
    call = lambda method, *args: e.apply({'params': params['encoder']}, *args, method=method)
    if e.per_channel:
      table = call('_channel_positions', grid, groups, mask, own)
    else:
      table = (call('_position_table', grid)[None] if own is None else call('_own_positions', grid, own)[1])[:, None]
    table = jnp.broadcast_to(table, (len(table), 1, math.prod(grid), e.embed_dim))
    depth = jnp.asarray(sincos((layers,), e.embed_dim))
    return (table[:, :, None] + (depth - depth[:1])[:, None]).reshape(len(table), 1, -1, e.embed_dim)

  def _entropy(self, image: jax.Array, there: jax.Array) -> jax.Array:
    """Entropies [B, N] of the patches of volumes [B, K, H, W, C], 0 .. 1 in each sample; 1 where all are alike."""
    low, high = (f(image, axis=(1, 2, 3), keepdims=True) for f in (jnp.min, jnp.max))
    eight = jnp.round((image - low) / jnp.maximum(high - low, 1e-6) * 255)
    found = entropy(patchify(jax.lax.stop_gradient(eight), self._patch, per_channel=True))  # [B, C, N]
    found = (found if self.encoder.per_channel else found.sum(axis=1)).reshape(len(image), -1)
    least = jnp.where(there, found, jnp.inf).min(axis=1, keepdims=True)
    span = jnp.where(there, found, -jnp.inf).max(axis=1, keepdims=True) - least
    return jnp.where(span > 1e-6, (found - least) / jnp.maximum(span, 1e-6), 1.0)

  def _errors(self, found: jax.Array, target: jax.Array, batch: Batch, flat: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squared errors [B, N] of what a decoder found for targets [B, K, H, W, C], and those of zeros."""
    e, out = self.encoder, []
    mask = None if e.per_channel or 'channel_mask' not in batch else batch['channel_mask'][:, 0]
    deep, _ = self._pixels
    slot = lambda x, size: x.reshape(len(x), -1, size) if e.per_channel else x
    volume = slot(patchify(target, self._patch, e.per_channel), deep)
    plane = patchify(target[:, 0], e.patch_size, e.per_channel)  # in the places of the first layer
    groups = target.shape[-1] if e.per_channel else 1
    plane = plane.reshape(len(plane), groups, -1, plane.shape[-1])
    cells = volume.shape[1] // groups
    plane = jnp.pad(plane, ((0, 0), (0, 0), (0, cells - plane.shape[2]), (0, 0)))
    plane = plane.reshape(len(plane), -1, plane.shape[-1])
    for predicted, pixels in ((found[..., :deep], volume), (found[..., deep:], plane)):
      here = None if mask is None else jnp.tile(mask, (1, pixels.shape[-1] // mask.shape[1]))[:, None]
      wanted = normalised(pixels, here)
      mean = lambda x, here=here: mean_of(jnp.square(x), here)[..., 0]
      out.append((mean(predicted - wanted), mean(wanted)))
    error, plain = (jnp.where(flat[:, None], image, volume) for volume, image in zip(*out, strict=True))
    return error, plain


def sobel(image: jax.Array) -> jax.Array:
  """The mean over the axes of volumes [B, *grid, C] of the strength of their gradients, of 5 taps, [B, *grid, C].

  Each is the derivative (-1, -2, 0, 2, 1) along its axis and the average (1, 4, 6, 4, 1) / 16 along the others, as of
  OpenCV's Sobel of size 5; the border is mirrored about its pixels.
  """
  def along(x, axis, taps):
    padded = jnp.pad(x, [(2, 2) if a == axis else (0, 0) for a in range(x.ndim)], mode='reflect')
    return sum(t * jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i, t in enumerate(taps) if t)

  axes, total = range(1, image.ndim - 1), jnp.zeros_like(image)
  for axis in axes:
    x = along(image, axis, (-1, -2, 0, 2, 1))
    for other in axes:
      x = x if other == axis else along(x, other, (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16))
    total = total + jnp.abs(x)
  return total / len(axes)


def entropy(values: jax.Array) -> jax.Array:
  """The entropy in bits of values [..., P], each taken as one of so many kinds, [...]."""
  ordered = jnp.sort(values.reshape(-1, values.shape[-1]), axis=-1)
  find = lambda row, side: jnp.searchsorted(row, row, side=side)
  counts = jax.vmap(lambda row: find(row, 'right') - find(row, 'left'))(ordered)
  return -jnp.log2(counts / values.shape[-1]).mean(axis=-1).reshape(values.shape[:-1])
