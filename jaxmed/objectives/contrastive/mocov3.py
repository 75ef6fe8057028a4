"""MoCo v3: contrast with a momentum encoder, without a queue (Chen, Xie, He 2021; facebookresearch/moco-v3)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmed.contracts import Batch, Encoder, Variables
from jaxmed.errors import UserError
from jaxmed.models.decoders.heads import MLPHead
from jaxmed.models.encoders.vit import ViT
from jaxmed.objectives import networks
from jaxmed.objectives.base import Method
from jaxmed.objectives.contrastive import siamese
from jaxmed.objectives.losses.contrast import info_nce, normalize, pairs
from jaxmed.objectives.networks import PHOTOMETRIC, Clock, with_stats


@dataclasses.dataclass(frozen=True)
class MoCoV3(Method):
  """Predicted views against the momentum encoder's keys of the other views (moco/builder.py, vits.py, CONFIG.md).

  2 T times the cross-entropy, in both directions summed; with more than two views twice the mean over ordered pairs.
  Keys are those of the global batch. Heads have batch norm over each view by itself, the last one without scale and
  bias. The official code moves the momentum encoder before the forward pass, here it moves after the update: the same
  sequence of weights.

  Attributes:
    temperature: 0.2 as published for ViTs (1.0 for ResNet-50).
    momentum_start: of the momentum encoder, to 1 along a cosine: 0.99 (0.996 for 1000 epochs).
    freeze_patch_embed: keeps a ViT's patch projection as it was drawn, which steadies training; no effect on others.
    projector_layers, predictor_layers: 3 and 2 as published for ViTs (2 and 2 for ResNet-50).
    predictor_norm: whether the predictor ends in batch norm, as published for ViTs (not for ResNet-50).
    hidden_dim: of both heads; 0 for 4096, at most 12 times the encoder's width.
    out_dim: of both heads.
    feature: 'cls' or 'mean', what the projector reads.
    chunk: keys that are compared at a time, 0 for all at once, -1 chooses (see contrast.log_partition).
    encoder_norm: whether the encoder's batch norm is over all views 'together' or over each one 'apart', as in the
      official code, which runs the encoder once a view. Encoders without batch norm are better off with 'together'.
  """

  encoder: Encoder
  temperature: float = 0.2
  momentum_start: float = 0.99
  freeze_patch_embed: bool = True
  projector_layers: int = 3
  predictor_layers: int = 2
  predictor_norm: bool = True
  hidden_dim: int = 0
  out_dim: int = 256
  feature: str = 'cls'
  chunk: int = -1
  encoder_norm: str = 'together'
  clock: Clock = Clock()

  LEARNING_RATE: ClassVar = (2.4e-3, 4096)  # 1.5e-4 * B / 256 at the published batch of 4096
  FEATURE: ClassVar[str] = 'cls'
  DEFAULTS: ClassVar[dict[str, Any]] = {
      'encoder': {'pos': 'sincos', 'kernel_init': 'xavier_qkv', 'patch_init': '', 'token_std': 1e-6},
      'optimizer': {'weight_decay': 0.1},
      'augment': {'views': 2, 'scale': (0.08, 1.0), **PHOTOMETRIC},
  }

  def __post_init__(self):
    siamese.check(self.feature, self.encoder_norm, temperature=self.temperature, out_dim=self.out_dim,
                  projector_layers=self.projector_layers, predictor_layers=self.predictor_layers)
    if not 0 <= self.momentum_start <= 1:
      raise UserError(f'objective.momentum_start {self.momentum_start} must lie in [0, 1]')
    if self.chunk < -1:
      raise UserError(f'objective.chunk {self.chunk} must be -1 (chosen), 0 (all at once) or a number of keys')

  def _head(self, layers: int, norm: bool) -> MLPHead:
    hidden = self.hidden_dim or siamese.width(4096, self.encoder)
    return MLPHead((*(hidden,) * (layers - 1), self.out_dim), last_norm='plain' if norm else 'none', last_bias=False)

  @property
  def projector(self) -> MLPHead:
    """Features to keys, in both encoders."""
    return self._head(self.projector_layers, True)

  @property
  def predictor(self) -> MLPHead:
    """Projections to queries."""
    return self._head(self.predictor_layers, self.predictor_norm)

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed variables, from the shapes of a batch of views."""
    siamese.count_views(batch)
    keys = jax.random.split(rng, 3)
    params = {'encoder': siamese.init_encoder(self.encoder, keys[0], batch),
              'projector': siamese.init_head(self.projector, keys[1], self.encoder.embed_dim),
              'predictor': siamese.init_head(self.predictor, keys[2], self.out_dim)}
    target = {name: jax.tree.map(jnp.copy, params[name]) for name in ('encoder', 'projector')}
    return {'params': params, 'target': target, 'extra': {}}

  def momentum(self, step: jax.Array) -> jax.Array:
    """Share of the momentum encoder that stays."""
    return networks.cosine(self.momentum_start, 1.0, step, self.clock.steps)

  def frozen(self, step: jax.Array) -> dict[str, jax.Array]:
    """The patch projection, where it stays as it was drawn."""
    still = self.freeze_patch_embed and isinstance(self.encoder, ViT)
    return {'encoder/patch_embed': jnp.ones_like(step, bool)} if still else {}

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True):
    """Symmetric InfoNCE over the global batch."""
    del step
    params, target, group = variables['params'], variables['target'], batch['global']
    x, encoder_stats = siamese.encode(self.encoder, params['encoder'], group, rng, train, self.feature,
                                      self.encoder_norm)
    z, projector_stats = siamese.view_by_view(self.projector, params['projector'], x, train)
    q, predictor_stats = siamese.view_by_view(self.predictor, params['predictor'], z, train)
    teacher_group = networks.seen_by_teacher(group)
    k, _ = siamese.encode(networks.quiet(self.encoder), target['encoder'], teacher_group, rng, train, self.feature,
                          self.encoder_norm)
    k, _ = siamese.view_by_view(self.projector, target['projector'], k, train)
    q, k = normalize(q), jax.lax.stop_gradient(normalize(k))
    one = lambda i, j: info_nce(q[:, i], k[:, j], k[:, j, None], self.temperature, chunk=self.chunk)
    losses, right = zip(*(one(i, j) for i, j in pairs(q.shape[1])), strict=True)
    loss = 2 * (2 * self.temperature) * sum(losses) / len(losses)
    metrics = {'moco_loss': loss, 'contrast_accuracy': sum(right) / len(right)}
    stats = dict(encoder=encoder_stats, projector=projector_stats, predictor=predictor_stats)
    return loss, (with_stats(metrics, train, **stats), variables['extra'])
