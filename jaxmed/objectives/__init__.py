"""Training objectives, one file each, and the registry of their names.

An objective is a frozen dataclass whose simple fields are its options, see `contracts.Objective`; `base.Method` has the
defaults of what it need not say:
  init(rng, batch) -> variables {'params', 'target', 'extra'}: trained by gradient; a part of params that follows by
    EMA; the rest that must survive.
  loss(variables, batch, rng, step, train) -> (loss, (metrics, extra)), over the global batch. metrics may hold 'stats',
    new running statistics of batch normalisation by the paths of params.
  momentum(step): of the EMA, where there is a target.
  encoder_params(variables): the weights of `encoder`, which is the product.
  DEFAULTS: what the method wants of the other config sections, used where the user says nothing.
  LEARNING_RATE: (peak rate, reference batch), scaled by the square root of the batch; higher for narrow encoders.
  FEATURE: 'cls' or 'mean', the vector it recommends.
  FIELDS: what it wants of a record, ('image',) by default, see `contracts.FIELDS`. REQUIRED: of these what every
    training record must have; records without are left out. PREDICTS: what of a record it predicts itself, 'mask' by
    `logits(variables, batch, train, rngs) -> ((logits, ...), stats)`, 'label' or 'number' by `predict(variables,
    batch)`, or 'phases' of windows by `phases(variables, batch)`, logits of each frame; '' for nothing. WINDOWS:
    whether its samples may be windows of several records, see `data.feed.windows`.
Optionally `frozen(step)`, {path of parameters: whether they rest at this step}, and `pictures(variables, batch, rng)`,
a dict of named image arrays for the report. What the run fills in is no option: `clock` (its length), `rows` (records),
`names` and `stored` (of the classes of masks), `bases` (views that tile a record), `window` (records of a sample).
A batch is one view of each sample, or, with DEFAULTS['augment']['views'] > 1, groups of views: see `augment.views`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmed.contracts import Objective
from jaxmed.errors import choose
from jaxmed.objectives.clustering.deepcluster import DeepCluster
from jaxmed.objectives.clustering.swav import SwAV
from jaxmed.objectives.contrastive.barlow import BarlowTwins
from jaxmed.objectives.contrastive.byol import BYOL
from jaxmed.objectives.contrastive.lejepa import LeJEPA
from jaxmed.objectives.contrastive.lvm_med import LVMMed
from jaxmed.objectives.contrastive.mocov3 import MoCoV3
from jaxmed.objectives.contrastive.simclr import SimCLR
from jaxmed.objectives.contrastive.vicreg import VICReg
from jaxmed.objectives.dense.label_autoencoder import LabelAutoencoder
from jaxmed.objectives.dense.segment import Segment
from jaxmed.objectives.dense.semi_segment import SemiSegment
from jaxmed.objectives.distillation.dino import DINO
from jaxmed.objectives.distillation.dinov2 import DINOv2
from jaxmed.objectives.distillation.dinov3 import DINOv3
from jaxmed.objectives.distillation.ibot import IBOT
from jaxmed.objectives.masked.data2vec import Data2Vec
from jaxmed.objectives.masked.ijepa import IJEPA
from jaxmed.objectives.masked.mae import MAE
from jaxmed.objectives.masked.simmim import SimMIM
from jaxmed.objectives.masked.spark import SparK
from jaxmed.objectives.paired.clip import CLIP
from jaxmed.objectives.paired.convirt import ConVIRT
from jaxmed.objectives.paired.mind_eye import MindEye
from jaxmed.objectives.paired.more import MoRE
from jaxmed.objectives.paired.siglip import SigLIP
from jaxmed.objectives.paired.symile import Symile
from jaxmed.objectives.paired.unicl import UniCL
from jaxmed.objectives.supervised.fusion import Fusion
from jaxmed.objectives.supervised.gtp4o import GTP4o
from jaxmed.objectives.supervised.regress import Regress
from jaxmed.objectives.supervised.supervised import Supervised
from jaxmed.objectives.temporal.anticipate import Anticipate
from jaxmed.objectives.temporal.phases import Phases
from jaxmed.objectives.temporal.phases_tools import PhasesTools
from jaxmed.objectives.volumes.alice import Alice
from jaxmed.objectives.volumes.gemini import GEMINI
from jaxmed.objectives.volumes.joint_clustering import JointClustering
from jaxmed.objectives.volumes.models_genesis import ModelsGenesis
from jaxmed.objectives.volumes.swin_unetr_ssl import SwinUNETRSSL
from jaxmed.objectives.volumes.uni4eye import Uni4Eye
from jaxmed.objectives.volumes.voco import VoCo
from jaxmed.objectives.volumes.volume_fusion import VolumeFusion

METHODS: dict[str, Any] = {
    'mae': MAE, 'simmim': SimMIM, 'ijepa': IJEPA, 'data2vec': Data2Vec, 'spark': SparK,
    'dino': DINO, 'ibot': IBOT, 'dinov2': DINOv2, 'dinov3': DINOv3,
    'simclr': SimCLR, 'mocov3': MoCoV3, 'byol': BYOL, 'swav': SwAV, 'deepcluster': DeepCluster,
    'barlow': BarlowTwins, 'vicreg': VICReg, 'lejepa': LeJEPA, 'lvm_med': LVMMed, 'voco': VoCo,
    'swin_unetr_ssl': SwinUNETRSSL, 'models_genesis': ModelsGenesis, 'volume_fusion': VolumeFusion, 'gemini': GEMINI,
    'alice': Alice, 'joint_clustering': JointClustering, 'uni4eye': Uni4Eye,
    'clip': CLIP, 'siglip': SigLIP, 'convirt': ConVIRT, 'unicl': UniCL, 'mind_eye': MindEye, 'symile': Symile,
    'more': MoRE, 'supervised': Supervised, 'regress': Regress, 'fusion': Fusion, 'gtp4o': GTP4o, 'segment': Segment,
    'phases': Phases, 'anticipate': Anticipate, 'phases_tools': PhasesTools,
    'label_autoencoder': LabelAutoencoder, 'semi_segment': SemiSegment,
}


def get(name: str) -> Any:
  """The objective's class by its name; a UserError names the nearest."""
  return METHODS[choose('method', name, METHODS)]


FILLED = ('encoder', 'towers', 'clock', 'rows', 'names', 'stored', 'bases', 'window')  # fields that a run fills in


def default_options(name: str) -> dict[str, Any]:
  """The options of a method that a config may set, with their defaults."""
  plain = lambda value: dict(value) if isinstance(value, Mapping) else value
  return {f.name: plain(f.default) for f in dataclasses.fields(get(name)) if f.name not in FILLED}


def filled(method: Any, **known: Any) -> dict[str, Any]:
  """Those of `known` that the method has a field for."""
  return {f.name: known[f.name] for f in dataclasses.fields(method) if f.name in known}


def feature_of(objective: Objective) -> str:
  """The vector that an objective recommends: the one that its option `feature` trains, where it has that option."""
  return objective.feature
