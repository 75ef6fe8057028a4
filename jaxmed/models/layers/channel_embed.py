"""What a channel's tokens are told of it: a learned table, or one hashed table that any names share.

The hashed form is feature multiplexing (Unified Embedding, arXiv 2305.12102): one table of rows serves every feature
of a channel (its name, stain, modality, ...), each feature with hash functions of its own, so a new name or a new kind
of metadata needs no new parameters, and a name that training never saw has a vector too. Several rows a feature, one a
hash function, make it unlikely that two names share all of them; a matrix a feature tells the features apart.

OptEmbed (arXiv 2208.04482; fuyuanlyu/OptEmbed) shrinks such a table: a threshold a feature, learned beside it, rules
out rows of small norm, and features may be told by fewer numbers of a row (`widths`), which a search over widths that
training drew at random finds (`train/widths.py`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmed.errors import UserError, choose
from jaxmed.models.layers.initial import normal

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
  return nn.initializers.orthogonal() if name == 'orthogonal' else normal()


class HashedChannels(nn.Module):
  """Embeddings [V, D] of channels by name and features, out of one table of `rows` rows of `width` numbers.

  The vectors of a feature's K rows stand side by side; a matrix of its own takes them to D, and the features add up.
  """

  channels: tuple[str, ...]
  dim: int
  rows: int
  hashes: int
  width: int
  prune: bool = False  # rows below their feature's threshold are zero
  widths: tuple[int, ...] = ()  # numbers of a row that each of FEATURES reads, () for all
  draw: bool = False  # widths drawn at random, U{1 .. width} for each channel and feature, where there is an rng

  @nn.compact
  def __call__(self) -> jax.Array:
    named = nn.with_logical_partitioning
    table = self.param('rows', named(nn.initializers.normal(1.0), (None, None)), (self.rows, self.width), jnp.float32)
    wide = self.hashes * self.width
    kernel = self.param('kernel', named(nn.initializers.normal(0.02 / wide**0.5), ('stack', None, 'embed')),
                        (len(FEATURES), wide, self.dim), jnp.float32)
    index = stacked(self.channels, self.rows, self.hashes)  # [V, F, K]
    picked = table[np.maximum(index, 0)] * (index >= 0)[..., None]  # [V, F, K, width]
    if self.prune:
      zeros = named(nn.initializers.zeros_init(), (None,))
      picked = picked * kept(picked, self.param('threshold', zeros, (len(FEATURES),), jnp.float32))[..., None]
    if self.widths:
      picked = picked * narrow(np.asarray(self.widths), self.width)[:, None]
    if self.draw and self.has_rng('dropout'):
      widths = jax.random.randint(self.make_rng('dropout'), index.shape[:2], 1, self.width + 1)
      picked = picked * narrow(widths, self.width)[:, :, None]
    return jnp.einsum('vfw,fwd->vd', picked.reshape(*index.shape[:2], wide), kernel)


def narrow(widths: Any, width: int) -> jax.Array:
  """Factors [..., width] that leave the first `widths` [...] numbers of a row."""
  return (jnp.arange(width) < widths[..., None]).astype(jnp.float32)


def kept(picked: jax.Array, threshold: jax.Array) -> jax.Array:
  """1 for rows [V, F, K, width] whose mean magnitude is above their feature's threshold [F], else 0, [V, F, K].

  The mean, where OptEmbed takes the sum, so that thresholds mean the same for every width.
  """
  return above(jnp.abs(picked).mean(axis=-1) - threshold[:, None])


@jax.custom_vjp
def above(x: jax.Array) -> jax.Array:
  """1 where x > 0, else 0, with the long-tailed estimate of a derivative of OptEmbed's code (models/layer.py).

  2 - 4 |x| up to 0.4, then 0.4 up to 1, then 0.
  """
  return (x > 0).astype(x.dtype)


def _above_bwd(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
  size = jnp.abs(x)
  return (g * jnp.where(size > 1, 0.0, jnp.where(size > 0.4, 0.4, 2 - 4 * size)),)


above.defvjp(lambda x: (above(x), x), _above_bwd)


def census(params: Mapping[str, Any], channels: Sequence[str], widths: Sequence[int] = ()) -> dict[str, dict[str, int]]:
  """What the features of these channels take of a table: {feature: {'rows', 'kept', 'width'}}, of those that they have.

  Args:
    params: of a HashedChannels, unboxed. A row that two features share counts for each.
  """
  table = np.asarray(params['rows'])
  threshold = np.asarray(params.get('threshold', np.full(len(FEATURES), -1.0)))
  index = stacked(channels, len(table), params['kernel'].shape[1] // table.shape[1])
  out = {}
  for f, feature in enumerate(FEATURES):
    rows = np.unique(index[:, f][index[:, f] >= 0])
    if len(rows):
      out[feature] = {'rows': len(rows), 'kept': int((np.abs(table[rows]).mean(axis=1) > threshold[f]).sum()),
                      'width': int(widths[f]) if len(widths) else table.shape[1]}
  return out


def numbers(found: Mapping[str, Mapping[str, int]], width: int) -> tuple[int, int]:
  """Numbers of a table that a `census` keeps, and those without pruning."""
  return (sum(c['kept'] * c['width'] for c in found.values()), sum(c['rows'] * width for c in found.values()))


def stacked(channels: Sequence[str], rows: int, hashes: int) -> np.ndarray:
  """`rows_of` all channels, [V, F, K]."""
  return np.stack([rows_of(c, rows, hashes) for c in channels])


def told(found: Mapping[str, Mapping[str, int]], width: int) -> str:
  """A census in words, with the bytes that pruning saves."""
  few, many = numbers(found, width)
  parts = [f'{name}: {c["kept"]} of {c["rows"]} rows, {c["width"]} of {width} numbers' for name, c in found.items()]
  return f'{"; ".join(parts)}; together {few} of {many} numbers ({4 * few:,} of {4 * many:,} bytes)'


def check(channels: Sequence[str], rows: int, hashes: int, width: int, prune: float, widths: Sequence[int]) -> None:
  """Raises a UserError for names that are none, or options of a hashed table that do not go together."""
  stacked(channels, rows, hashes)
  if prune < 0:
    raise UserError(f'encoder.hash_prune {prune} must be at least 0, the weight of a penalty: 0 keeps all rows')
  if widths and (len(widths) != len(FEATURES) or not all(1 <= w <= width for w in widths)):
    raise UserError(f'encoder.hash_widths {tuple(widths)} must be {len(FEATURES)} numbers from 1 to hash_width '
                    f'{width}: of {", ".join(FEATURES)}')
