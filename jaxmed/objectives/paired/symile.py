"""Symile: several modalities of a record find each other by one inner product (Saporta et al. 2024, 2411.01053)."""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Variables
from jaxmed.errors import UserError, choose
from jaxmed.models.layers import initial
from jaxmed.models.layers.linear import Dense
from jaxmed.models.layers.norm import normalize
from jaxmed.models.layers.transformer import LayerNorm
from jaxmed.objectives import modalities
from jaxmed.objectives.losses import symile
from jaxmed.objectives.modalities import Modal
from jaxmed.objectives.networks import with_stats

NORMALIZE = ('unit', 'layer_norm')


@dataclasses.dataclass(frozen=True)
class Symile(Modal):
  """Cross-entropy of finding the rest of a record from each modality, by sum_d prod_m x_m[d] (rajesh-lab/symile).

  The modalities are the image and those whose towers the config names: towers.text, .signal, .table; with none named,
  the text. Each vector goes through a linear layer and is normalised. Where a record lacks a modality, a learned vector
  stands for what its tower makes of it, and the record stays in the batch. That is the published placeholder with an
  indicator (examples/binary_xor_missing.py; a [MISSING] token, or the mean with an indicator's embedding, in
  Symile-M3): a linear layer of both is one learned vector, too. Towers of texts and tables are as elsewhere here. The
  logit scale is not clamped.

  Attributes:
    out_dim: width of the vectors that are compared.
    temperature: the logits begin with the deviation of CLIP's at this one, see `losses.symile.first_scale`.
    normalize: 'layer_norm' (Symile-M3, Symile-MIMIC; with a trained scale and bias) or 'unit' (the XOR examples).
    negatives: 'shuffled', B a record, or 'all' combinations of up to three modalities.
    chunk: candidates that are compared at a time, 0 for all at once, -1 chooses.
  """

  out_dim: int = 512
  temperature: float = 0.07
  normalize: str = 'layer_norm'
  negatives: str = 'shuffled'
  chunk: int = -1

  LEARNING_RATE: ClassVar = (1e-3, 1024)  # CLIP's; the published commands give theirs on the command line
  DEFAULTS: ClassVar[dict[str, Any]] = {
      **Modal.DEFAULTS, 'optimizer': {'weight_decay': 0.01}}  # experiments/args.py, --weight_decay

  def __post_init__(self):
    super().__post_init__()
    choose('objective.normalize', self.normalize, NORMALIZE)
    if self.out_dim < 1 or self.temperature <= 0:
      raise UserError(f'objective.out_dim {self.out_dim} and temperature {self.temperature} must be positive')
    if self.towers:
      symile.check(len(self.modalities), self.negatives)

  @property
  def projection(self) -> Dense:
    """The linear layer of a modality."""
    return Dense((self.out_dim,), ('embed', None))

  @property
  def norm(self) -> LayerNorm:
    """The norm of a modality, with PyTorch's epsilon."""
    return LayerNorm(epsilon=1e-5)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch."""
    keys = jax.random.split(rng, 1 + 2 * len(self.modalities))
    params = self.init_towers(keys[0], batch)
    boxed = nn.with_logical_partitioning(initial.normal(), ('embed',))
    heads = {}
    for name, width, key, hole in zip(self.modalities, self.widths, keys[1::2], keys[2::2], strict=True):
      heads[name] = {'project': self.projection.init(key, jnp.zeros((1, width)))['params'],
                     'missing': boxed(hole, (width,), jnp.float32)}
      if self.normalize == 'layer_norm':
        heads[name]['norm'] = self.norm.init(key, jnp.zeros((1, self.out_dim)))['params']
    return {'params': params | {'heads': heads, 'similarity': {'scale': self.first_scale()}}, 'target': {}, 'extra': {}}

  def first_scale(self) -> jax.Array:
    """The logit scale in the beginning."""
    if self.normalize == 'unit':
      return jnp.asarray(symile.first_scale(len(self.modalities), self.out_dim, self.temperature), jnp.float32)
    return jnp.asarray(-math.log(self.temperature) - math.log(self.out_dim), jnp.float32)

  def compared(self, params: Any, batch: Batch, rng: jax.Array | None, train: bool
               ) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    """The M vectors [B, out_dim] that are compared, and new running statistics."""
    features, there, stats = self.encoded(params, batch, rng, train)
    out = []
    for m, (name, x) in enumerate(zip(self.modalities, self.vectors(features), strict=True)):
      head = params['heads'][name]
      x = jnp.where(there[:, m, None], x, head['missing'])
      x = self.projection.apply({'params': head['project']}, x)
      out.append(normalize(x) if self.normalize == 'unit' else self.norm.apply({'params': head['norm']}, x))
    return tuple(out), stats

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """The loss over the records of the global batch."""
    del step
    params, keys = variables['params'], jax.random.split(rng)
    vectors, stats = self.compared(params, batch, keys[0], train)
    scale = params['similarity']['scale']
    loss, right = symile.symile(vectors, scale, keys[1], modalities.real(batch), self.negatives, self.chunk)
    metrics = {f'from_{name}': share for name, share in zip(self.modalities, right, strict=True)}
    return loss, (with_stats(metrics | {'logit_scale': jnp.exp(scale)}, train, **stats), variables['extra'])
