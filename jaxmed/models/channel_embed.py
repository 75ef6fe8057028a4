"""What a channel's tokens are told of it: a learned table, or one hashed table that any names share.

The hashed form is feature multiplexing (Unified Embedding, arXiv 2305.12102): one table of rows serves every feature
of a channel (its name, stain, modality, ...), each feature with hash functions of its own, so a new name or a new kind
of metadata needs no new parameters, and a name that training never saw has a vector too. Several rows a feature, one a
hash function, make it unlikely that two names share all of them; a matrix a feature tells the features apart.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.errors import UserError, choose

KINDS = ('table', 'hashed')
INITS = ('trunc_normal', 'orthogonal')
FEATURES = ('name', 'modality', 'stain', 'marker', 'wavelength', 'sequence', 'site', 'scanner')


def unnamed(count: int) -> tuple[str, ...]:
  """Names for channels of which only the place is known."""
  return tuple(f'channel_{i}' for i in range(count))


def parse(channel: str) -> dict[str, str]:
  """'DNA|stain=Hoechst|modality=fluorescence' -> {'name': 'DNA', 'stain': 'Hoechst', 'modality': 'fluorescence'}.

  Raises:
    UserError: a feature that is none of FEATURES, with the nearest one, or given twice.
  """
  name, *more = (part.strip() for part in channel.split('|'))
  found = {'name': name}
  for part in more:
    key, _, value = part.partition('=')
    if choose(f'feature of channel {name!r}', key.strip(), FEATURES) in found:
      raise UserError(f'channel {channel!r} has the feature {key.strip()!r} twice')
    found[key.strip()] = value.strip()
  return found


def rows_of(channel: str, rows: int, hashes: int) -> np.ndarray:
  """Rows of the table [F, K] of each feature by each hash function; -1 where the channel lacks the feature.

  A row is BLAKE2b (64 bits, little endian) of 'FEATURE/k/value', modulo `rows`: the same on every machine.
  """
  found = parse(channel)
  out = np.full((len(FEATURES), hashes), -1, np.int32)
  for i, feature in enumerate(FEATURES):
    for k in range(hashes) if feature in found else ():
      digest = hashlib.blake2b(f'{feature}/{k}/{found[feature]}'.encode(), digest_size=8).digest()
      out[i, k] = int.from_bytes(digest, 'little') % rows
  return out


def initializer(name: str) -> Any:
  """How a table of channels begins: 'trunc_normal' (deviation 0.02; insitro/ChannelViT) or 'orthogonal' (DiChaViT)."""
  return nn.initializers.orthogonal() if name == 'orthogonal' else nn.initializers.truncated_normal(0.02)


class HashedChannels(nn.Module):
  """Embeddings [V, D] of channels by name and features, out of one table of `rows` rows of `width` numbers.

  The vectors of a feature's K rows stand side by side; a matrix of its own takes them to D, and the features add up.
  """

  channels: tuple[str, ...]
  dim: int
  rows: int
  hashes: int
  width: int

  @nn.compact
  def __call__(self) -> jax.Array:
    named = nn.with_logical_partitioning
    table = self.param('rows', named(nn.initializers.normal(1.0), (None, None)), (self.rows, self.width), jnp.float32)
    wide = self.hashes * self.width
    kernel = self.param('kernel', named(nn.initializers.normal(0.02 / wide**0.5), (None, None, 'embed')),
                        (len(FEATURES), wide, self.dim), jnp.float32)
    index = stacked(self.channels, self.rows, self.hashes)  # [V, F, K]
    picked = table[np.maximum(index, 0)] * (index >= 0)[..., None]  # [V, F, K, width]
    return jnp.einsum('vfw,fwd->vd', picked.reshape(*index.shape[:2], wide), kernel)


def stacked(channels: Sequence[str], rows: int, hashes: int) -> np.ndarray:
  """`rows_of` all channels, [V, F, K]."""
  return np.stack([rows_of(c, rows, hashes) for c in channels])
