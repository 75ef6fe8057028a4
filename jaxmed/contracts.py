"""The types that the parts of jaxmed hand each other: a batch, an encoder, an objective, an evaluator.

Shapes: B samples, V views, C channel slots, N tokens, D width; `size` is the grid of an image, 2 or 3 axes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NotRequired, TypedDict, runtime_checkable
from typing import Protocol as Structure

import jax


class Views(TypedDict, total=False):
  """A group of views of each sample, as the view maker gives it for methods that compare views."""

  image: jax.Array  # [B, V, *size, C] float32, normalised; anything, NaN included, where a channel is missing
  channels: jax.Array  # [B, V, C] int32, ids in the vocabulary
  channel_mask: jax.Array  # [B, V, C] bool, channels that the view shows; absent where all do
  teacher_mask: jax.Array  # [B, V, C] bool, channels that a teacher sees; where channels are sampled
  sizes: jax.Array  # [B, V, rank] int32, pixels of each view in the corner of its array; with augment.sample_sizes
  mask: jax.Array  # [B, V, *size] int32, labels of pixels; -1 where the mask does not tell
  boxes: jax.Array  # [B, V, N, 2 * rank] float32, (start, end) in pixels of the view; rows of -1 for none
  view_box: jax.Array  # [B, V, 2 * rank] float32, (start, end) of the view in pixels of the loaded array
  view_flip: jax.Array  # [B, V, rank] bool, axes along which the view was flipped; where there are flips


# By the functional syntax, as `global` is a word of Python. With loader.window every array of a sample has an axis K of
# the window's records after B: image [B, K, *size, C], label [B, K], mask [B, K, *size].
Batch = TypedDict('Batch', {
    'image': jax.Array,  # [B, *size, C]; stored type from the pipeline, float32 and normalised from the view maker
    'channels': jax.Array,  # [B, C] int32, ids in the vocabulary; 0 where padded
    'channel_mask': jax.Array,  # [B, C] bool, channels that are there, or of these the ones that are shown
    'channel_there': jax.Array,  # [B, C] bool, channels that the sample has; where channels are sampled
    'sizes': jax.Array,  # [B, rank] int32, pixels of each image in the corner of its array; augment.sample_sizes
    'extent': jax.Array,  # [B, rank] int32, pixels of each image in the corner of the loaded array; loader.fit=aspect
    'label': jax.Array,  # [B] int32, class; -1 for none
    'number': jax.Array,  # [B] float32, the column loader.label as a number; NaN for none
    'index': jax.Array,  # [B] int32, row of the source; -1 for padding
    'mask': jax.Array,  # [B, *size] int32, labels of pixels; -1 where the mask does not tell
    'annotated': jax.Array,  # [B, K] bool, classes of masks that the record's source annotates
    'text': jax.Array,  # [B, L] int32, ids of bytes + 1 or of a tokenizer; 0 where padded
    'words': jax.Array,  # [B, L] int32, the word of each id from 1 on; 0 of special ids and where padded
    'signal': jax.Array,  # [B, T, K] float32, steps and channels; 0 where padded
    'signal_mask': jax.Array,  # [B, T] bool, steps that the signal has
    'boxes': jax.Array,  # [B, N, 2 * rank] float32, (start, end) in pixels of the array; rows of -1 for none
    'view_box': jax.Array,  # [B, 2 * rank] float32, (start, end) of the view in pixels of the loaded array
    'view_flip': jax.Array,  # [B, rank] bool, axes along which the view was flipped; where there are flips
    'similarity': jax.Array,  # [V, V] float32, cosines of the vocabulary's embeddings; the view maker takes it out
    'global': Views,  # views of `size`, in place of image, channels and masks
    'local': Views,  # small views
    'gram': Views,  # crops of the global views at another resolution, for DINOv3's Gram teacher
}, total=False)


class Variables(TypedDict):
  """What an objective trains, keeps and reads; four trees of arrays."""

  params: dict[str, Any]  # trained by gradient; 'encoder' is the encoder's
  target: dict[str, Any]  # a part of params by name, which follows by a moving average; {} for none
  extra: dict[str, Any]  # queues, centres, prototypes; {} for none
  fixed: NotRequired[dict[str, Any]]  # {tower: weights} that are only read; the run gives them, never `init`


@dataclasses.dataclass(frozen=True)
class Supports:
  """What an encoder can do beside `__call__`; each class says it in its constant `supports`.

  Attributes:
    one_pass: method `one_pass(groups, batch, train)`, several kinds of crops in one pass over the blocks.
    embed_patches: methods `embed_patches` and `encode`, so that hidden patches are left out and never computed.
    project: method `project(image)`, projected patches [B, C, N, D] of each channel.
    channel_vectors: method `channel_vectors()`, the embedding [V, D] of each channel of the vocabulary.
    penalty: method `penalty(params)`, a term that is added to any method's loss.
    concatenated: method `concatenated(image, channels, channel_mask)`, vectors of all channels side by side.
    sizes: `__call__` takes `sizes`, images of several sizes in one array.
    attention_maps: blocks save their attention weights, where all tokens look at each other.
    levels: `__call__` takes `levels`, a static tuple of blocks (from 1) or stages (0 is the stem); `Features.levels`
      holds their outputs in that order, each a `models.layers.tokens.Level`.
  """

  one_pass: bool = False
  embed_patches: bool = False
  project: bool = False
  channel_vectors: bool = False
  penalty: bool = False
  concatenated: bool = False
  sizes: bool = False
  attention_maps: bool = False
  levels: bool = False


@runtime_checkable
class Encoder(Structure):
  """A Flax module whose fields are its config. What a family has no option for is a constant, `models.layers.defaults`.

  `init(rng, image, ...)` and `apply(variables, image, ..., train, rngs)` go to `__call__(image, channels,
  channel_mask, train, hidden)`, which gives `models.layers.tokens.Features`.
  """

  supports: ClassVar[Supports]

  @property
  def image_size(self) -> tuple[int, ...]:
    """Native size; its rank is the rank of every input."""

  @property
  def patch_size(self) -> tuple[int, ...]:
    """Pixels of a cell of the token grid."""

  @property
  def in_channels(self) -> int:
    """Channels of the input in one order, or rows of the vocabulary."""

  @property
  def embed_dim(self) -> int:
    """Width D of the features."""

  @property
  def per_channel(self) -> bool:
    """Whether there is one token a patch and channel."""

  @property
  def class_token(self) -> bool:
    """Whether there is a class token."""

  @property
  def num_registers(self) -> int:
    """Register tokens."""

  @property
  def num_prefix_tokens(self) -> int:
    """Class token and registers."""

  @property
  def num_levels(self) -> int:
    """Blocks or stages, the last of `levels`; 0 for none."""

  @property
  def pos(self) -> str:
    """Positions: 'learned', 'sincos', 'rope' or 'none'."""

  @property
  def mask_token(self) -> bool:
    """Whether there is a token that hidden patches become."""

  @property
  def masking(self) -> str:
    """What hidden patches become: 'token', or 'sparse' where they are left out of a map."""

  @property
  def local_norm(self) -> bool:
    """Whether `__call__` takes `local`, for the final norm of local crops."""

  @property
  def pooling(self) -> str:
    """How vectors of several channels become one: 'mean' or 'concat'."""

  @property
  def channel_attention(self) -> str:
    """Which tokens look at each other: 'joint' for all at all."""

  @property
  def drop_path(self) -> float:
    """Rate of stochastic depth of the last block."""

  @property
  def rope_shift(self) -> float:
    """Random shift of rotary coordinates."""

  @property
  def rope_jitter(self) -> float:
    """Random stretch of each rotary axis."""

  @property
  def rope_rescale(self) -> float:
    """Random scale of rotary coordinates."""

  @property
  def hash_draw(self) -> bool:
    """Whether widths of hashed channel embeddings are drawn in training."""

  @property
  def packing(self) -> float:
    """Rows that tokens are packed into, as a share of the samples; 0 for none."""

  @property
  def remat(self) -> str:
    """Which intermediates are computed again in the backward pass."""

  @property
  def adapter(self) -> Any:
    """What is trained beside frozen weights, a `models.layers.adapters.Adapter`; None for nothing."""

  @property
  def dtype(self) -> Any:
    """'float32' or 'bfloat16' compute."""

  def init(self, *args: Any, **kwargs: Any) -> Any:
    """Boxed variables."""

  def apply(self, *args: Any, **kwargs: Any) -> Any:
    """What `__call__`, or the method named by `method`, gives."""

  def clone(self, **changes: Any) -> Any:
    """The encoder with other fields."""


PENALTY = 'penalty'  # the collection of a decoder's own terms of the loss of a training pass, [] each


@runtime_checkable
class Decoder(Structure):
  """A Flax module that makes logits of pixels from maps of an encoder, see `models.decoders.dense`.

  One whose outputs are not to be weighted as nnU-Net's has `output_weights(count)`, as `losses.segmentation` has it.
  """

  @property
  def num_classes(self) -> int:
    """K of the logits."""

  @property
  def deep_supervision(self) -> bool:
    """Whether there are logits of coarser grids too, where the decoder has them."""

  @classmethod
  def levels(cls, encoder: Encoder) -> tuple[int, ...]:
    """The levels of an encoder whose maps it takes, in the order in which it takes them."""

  def init(self, *args: Any, **kwargs: Any) -> Any:
    """Boxed variables."""

  def apply(self, *args: Any, **kwargs: Any) -> Any:
    """Of an image [B, *size, C], maps ([B, *grid, D], ...) and `train`: logits ([B, *size, K], ...) float32, the first
    on the grid of the image; with `deep_supervision` others after it, mostly coarser."""


@runtime_checkable
class Objective(Structure):
  """A training method: a frozen dataclass of pure functions. Its simple fields are its options.

  `objectives.base.Method` has the defaults of what a method need not say: `frozen`, `pictures`, `momentum`, `feature`.
  """

  LEARNING_RATE: ClassVar[tuple[float, float]]  # (peak rate, reference batch)
  FEATURE: ClassVar[str]  # 'cls' or 'mean', the vector that it recommends
  DEFAULTS: ClassVar[dict[str, Any]]  # of the other config sections
  TOWERS: ClassVar[tuple[str, ...]]  # its networks, 'image' (the encoder) first; the run fills in the field `towers`
  OPTIONAL: ClassVar[tuple[str, ...]]  # of these the towers that a run may do without
  WHOLE: ClassVar[Mapping[str, str]]  # {tower: method} of fixed towers that are a whole run of a method, heads too
  GROUPS: ClassVar[Mapping[str, tuple[str, ...]]]  # {group of the optimizer: paths of its parameters}
  FIELDS: ClassVar[tuple[str, ...]]  # what it wants of a record, see FIELDS
  REQUIRED: ClassVar[tuple[str, ...]]  # of these what every training record must have
  PREDICTS: ClassVar[str]  # of a record what it predicts itself: 'mask' by `logits`, 'label' or 'number' by `predict`
  WINDOWS: ClassVar[bool]  # whether its samples may be windows of several records, loader.window

  @property
  def encoder(self) -> Encoder:
    """The network that is trained; the run fills it in."""

  @property
  def feature(self) -> str:
    """The vector that is trained, where that is an option; else FEATURE."""

  def init(self, rng: jax.Array, batch: Batch) -> Variables:
    """Boxed, from the shapes of a batch of views."""

  def loss(self, variables: Variables, batch: Batch, rng: jax.Array, step: jax.Array, train: bool = True) -> Any:
    """(loss, (metrics, extra)) over the global batch; metrics may hold 'stats', see `networks.run`.

    The loss is a scalar, or {group of the optimizer: scalar} where each group follows its own.
    """

  def momentum(self, step: jax.Array) -> jax.Array:
    """Share of the target that stays after a step; asked for only where there is a target."""

  def frozen(self, step: jax.Array) -> Mapping[str, jax.Array]:
    """{path of parameters: whether they rest at this step}."""

  def pictures(self, variables: Variables, batch: Batch, rng: jax.Array) -> Mapping[str, Any]:
    """Named image arrays for the report, such as 'reconstructions'."""

  def encoder_params(self, variables: Variables) -> Any:
    """The weights of `encoder`, which is the product."""

  def products(self, variables: Variables) -> dict[str, Any]:
    """{tower: weights} of all that is of use after a run."""


@runtime_checkable
class Evaluator(Structure):
  """Looks at a run while it trains: a frozen dataclass, such as `train.evaluators.KNN`.

  `train.evaluators.EVALUATORS` makes it by its name, given `every`; its other fields have defaults. All processes call
  the same evaluators in the same order, so that they may compute over the mesh together.
  """

  needs: ClassVar[str]  # in words, what a run lacks that it does not want

  @property
  def every(self) -> int:
    """Steps between its looks."""

  def wants(self, probe: Any) -> bool:
    """Whether it can look at a run, of which `train.probe.Probe` has method, data, held-out and labelled records."""

  def __call__(self, snapshot: Any) -> dict[str, float]:
    """Numbers by name, of a `train.probe.Snapshot`: `snapshot.state`, and features that evaluators share."""


@runtime_checkable
class EvaluationProtocol(Structure):
  """Scores a trained encoder after a run: a frozen dataclass, such as `evaluate.protocols.classify.Classify`.

  It fits on some splits of a source and scores another. Its simple fields are its options.
  `evaluate.protocols.PROTOCOLS` has the protocols by name; `evaluate.protocols.protocol.FeatureProtocol` is the base of
  those of frozen vectors.
  """

  @property
  def name(self) -> str:
    """A word for commands."""

  @property
  def task(self) -> str:
    """What is asked of the encoder, in words."""

  def run(self, encoder: Any, source: Any, label: str, *, feature: str = 'mean', batch_size: int = 64,
          seed: int = 0) -> dict[str, Any]:
    """Scores by name, with intervals: plain data."""

  def tables(self, result: Mapping[str, Any]) -> str:
    """What `run` returned as text."""


Protocol = EvaluationProtocol


KINDS = ('image', 'mask', 'class', 'text', 'signal', 'label', 'number', 'box', 'row')
# What an objective may want of a record.
FIELDS = ('image', 'mask', 'annotated', 'text', 'words', 'signal', 'boxes', 'label', 'number')
# What stands for a missing value; 0 for the other kinds.
_FILL = {'mask': -1, 'label': -1, 'number': float('nan'), 'box': -1, 'row': -1}


@dataclasses.dataclass(frozen=True)
class Field:
  """One array of a batch, of which each sample has a part.

  Attributes:
    name: its key.
    kind: one of KINDS, which decides what stands for a missing value and what geometry does to it. Channels go with
      'image', the steps of a signal with 'signal'; 'class' has a value for each class of masks.
    shape: of one sample. dtype: by its NumPy name.
  """

  name: str
  kind: str
  shape: tuple[int, ...]
  dtype: str

  @property
  def fill(self) -> float:
    """What stands for a missing value: -1 in masks, labels, boxes and rows, NaN for a number, else 0."""
    return _FILL.get(self.kind, 0)
