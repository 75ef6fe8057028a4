"""What methods with dense outputs share: an encoder, a decoder on its maps, and the image as it is known."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.augment.geometry import filled
from jaxmed.contracts import PENALTY, Batch, Decoder, Encoder
from jaxmed.models import registry
from jaxmed.models.decoders.dense import create_decoder, decoder_for, maps_of
from jaxmed.models.layers.norm import STATS
from jaxmed.models.layers.tokens import Features
from jaxmed.objectives.networks import encode, inputs, placed, run_noting

AUTO = 'auto'


def network(encoder: Encoder, name: str, count: int, deep_supervision: bool = False,
            options: Mapping[str, Any] | None = None) -> Decoder:
  """The decoder of that name, or with 'auto' that of the encoder's family, with `count` outputs a pixel."""
  auto = decoder_for(registry.family_of(encoder), tuple(encoder.patch_size)) if name == AUTO else name
  return create_decoder(auto, encoder, count, deep_supervision, **(options or {}))


def init(encoder: Encoder, decoder: Decoder, rng: jax.Array, batch: Batch) -> dict[str, Any]:
  """Boxed parameters {'encoder', 'decoder'}, from the shapes of a batch."""
  encoder_key, decoder_key = jax.random.split(rng)
  params = encoder.init(encoder_key, **inputs(batch))['params']
  found = jax.eval_shape(lambda p: maps(encoder, decoder, p, batch), nn.unbox(params))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)
  return {'encoder': params, 'decoder': decoder.init(decoder_key, image(encoder, batch), zeros)['params']}


def maps(encoder: Encoder, decoder: Decoder, params: Any, batch: Batch) -> tuple[jax.Array, ...]:
  """The maps [B, *grid, D] that a decoder takes, in evaluation."""
  features, _ = encode(encoder, params, batch, False, None, levels=decoder.levels(encoder))
  return maps_of(encoder, features, batch.get('channel_mask'))


def decode(encoder: Encoder, decoder: Decoder, params: Any, batch: Batch, train: bool, rngs: Any,
           fixed: bool = False, change: Callable[[Any], Any] = lambda maps: maps,
           **kwargs: Any) -> tuple[tuple[jax.Array, ...], Features, dict[str, Any], Any]:
  """(outputs, features, running statistics of 'encoder' and 'decoder', the decoder's own terms of the loss).

  Outputs are ([B, *size, K], ...) float32, the finest first. fixed: see `networks.encode`; kwargs go to the encoder.
  change: of the maps, before the decoder takes them.
  """
  features, encoder_stats = encode(encoder, params['encoder'], batch, train, rngs, fixed,
                                   levels=decoder.levels(encoder), **kwargs)
  taken = change(maps_of(encoder, features, batch.get('channel_mask')))
  outputs, left = run_noting((STATS, PENALTY), decoder, params['decoder'], image(encoder, batch), taken, train=train,
                             rngs=rngs)
  return outputs, features, {'encoder': encoder_stats, 'decoder': left.get(STATS, {})}, left.get(PENALTY, {})


def there(batch: Batch) -> jax.Array:
  """Pixels of the channels [B, *size, C] bool that a batch has: not those of missing channels, or beyond an image."""
  x = batch['image']
  out = jnp.ones(x.shape, bool)
  if 'channel_mask' in batch:
    out &= batch['channel_mask'].reshape(len(x), *[1] * (x.ndim - 2), -1)
  return out & filled(batch['sizes'], x.shape[1:-1])[..., None] if 'sizes' in batch else out


def image(encoder: Encoder, batch: Batch) -> jax.Array:
  """The image that a decoder takes: 0 where there is nothing, and each channel has its place."""
  known = jnp.where(there(batch), batch['image'], 0)
  return placed(known, batch['channels'], encoder.in_channels) if encoder.per_channel else known


def of_channels(encoder: Encoder, batch: Batch, x: jax.Array) -> jax.Array:
  """Outputs [B, *size, K] of the encoder's K channels in the order of a batch, [B, *size, C]."""
  if not encoder.per_channel:
    return x
  where = (batch['channels'][..., None] == jnp.arange(x.shape[-1])).astype(x.dtype)  # [B, C, K]
  return jnp.einsum('b...k,bck->b...c', x, where, precision=jax.lax.Precision.HIGHEST)


def mean_of(x: jax.Array, there: jax.Array) -> jax.Array:
  """The mean of x over what is there, both [B, *size, C]; 0 of nothing."""
  return jnp.where(there, x, 0).sum() / jnp.maximum(there.sum(dtype=jnp.float32), 1)
