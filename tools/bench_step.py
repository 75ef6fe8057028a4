"""Times one training step of jaxmed beside PyTorch's on the same CPU cores, alternating; prints ratios.

Each side lives in a process of its own and waits on a pipe while the other computes, so neither's idle
threads take the other's cores. A step is forward, loss, backward and AdamW in float32 on images already in
memory; augmentation is off, dropout and stochastic depth are 0 on both sides. jaxmed runs `Trainer.compile`
as training does (which also takes gradient norms and skips non-finite updates). PyTorch runs eager, with its
fused attention (scaled_dot_product_attention) and its fused AdamW: timm's VisionTransformer and ResNet, and MAE and
ChannelViT stated here in torch from their definitions on timm's blocks. SimCLR and DINOv2 are put together from
lightly's heads, losses and masked transformer; their views are made beforehand, DINOv2's masks too on PyTorch's side
(jaxmed draws them in the step), and both sides update a teacher and clip gradients by module.

The bound is what the step would take if its matrix products alone ran at the better of the two sides' rates
for a product of 2048 x 2048 x 2048, measured just before.

XLA asks for its scratch memory anew at each step, and Linux hands it over page by page; --huge-pages sets
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 for both sides, which makes the pages 512 times fewer. The setting works
for training too, put before the command.

Needs `pip install -e '.[parity]'` (after `make install`; `make bench` does both).

Example:
  python tools/bench_step.py --cases vit_tiny,vit_tiny_mae --rounds 7 --json bench.json
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from tools.needs import measured_on, need, run_script  # noqa: E402

CLASSES = 1000
LABEL_SMOOTHING = 0.1
RATE, DECAY, BETAS = 1e-3, 0.05, (0.9, 0.999)
DECODER = dict(dim=512, depth=8, heads=16)
MASK_RATIO = 0.75
GEMM = 2048
PROJECTION = 128  # SimCLR's output
LOCAL = dict(size=96, crops=8)
HEAD = dict(hidden_dim=2048, bottleneck_dim=256, out_dim=8192)  # of DINOv2, whose 65536 prototypes are many for a CPU
HIDDEN = (0.1, 0.5)  # share of patches, of half of DINOv2's global crops
CLIP = 3.0
RESNET50 = 4.09e9  # multiply-adds of an image of 224 px


@dataclasses.dataclass(frozen=True)
class Case:
  """One comparison: a model at 224 px with patches of 16."""

  model: str
  dim: int
  heads: int
  batch: int
  channels: int = 3
  method: str = 'supervised'
  depth: int = 12
  size: int = 224
  patch: int = 16
  attention: str = 'joint'  # over channel tokens

  @property
  def tokens(self) -> int:
    """Patch tokens of a sample."""
    return (self.size // self.patch) ** 2 * (self.channels if self.per_channel else 1)

  @property
  def per_channel(self) -> bool:
    """Whether each channel has tokens of its own."""
    return self.model.startswith('channel_vit')

  @property
  def mae(self) -> bool:
    """Whether most tokens are hidden and reconstructed."""
    return self.method == 'mae'

  @property
  def flops(self) -> float:
    """Operations of the matrix products of a step: 2 a multiply-add, backward counted as two forward."""
    if self.method in ('simclr', 'dinov2'):
      return 2.0 * self.batch * (_dinov2(self) if self.method == 'dinov2' else _simclr(self))
    pixels = self.patch**2 * (1 if self.per_channel else self.channels)
    shown = 1 + (int(self.tokens * (1 - MASK_RATIO)) if self.mae else self.tokens)
    forward = _transformer(shown, self.dim, self.depth)
    embed = self.tokens * pixels * self.dim  # its input needs no gradient
    if self.mae:
      wide = DECODER['dim']
      forward += shown * self.dim * wide + _transformer(1 + self.tokens, wide, DECODER['depth'])
      forward += self.tokens * wide * pixels
    else:
      forward += self.dim * CLASSES
    return 2.0 * self.batch * (3 * forward + 2 * embed)


def _transformer(tokens: int, dim: int, depth: int) -> int:
  return depth * (12 * tokens * dim * dim + 2 * tokens * tokens * dim)


def _simclr(case: Case) -> float:
  """Multiply-adds of a sample: two views, and the projector."""
  if case.model == 'resnet50':
    forward, embed = RESNET50, 0
  else:
    forward = _transformer(1 + case.tokens, case.dim, case.depth)
    embed = case.tokens * case.patch**2 * case.channels * case.dim
  return 2 * (3 * (forward + 2 * case.dim**2 + case.dim * PROJECTION) + 2 * embed)


def _dinov2(case: Case) -> float:
  """Multiply-adds of a sample: the student's global and local crops and the teacher's global ones, and their heads."""
  small = (LOCAL['size'] // case.patch) ** 2
  wide, deep = HEAD['hidden_dim'], HEAD['bottleneck_dim']
  head = case.dim * wide + wide * wide + wide * deep + deep * HEAD['out_dim']
  full = _transformer(1 + case.tokens, case.dim, case.depth)
  embed = case.patch**2 * case.channels * case.dim
  hidden = 2 * case.tokens * sum(HIDDEN) / 4  # half of the two crops have the mean of the shares
  student = 3 * (2 * full + LOCAL['crops'] * _transformer(1 + small, case.dim, case.depth)
                 + (2 + LOCAL['crops'] + hidden) * head)
  teacher = 2 * full + (2 + hidden) * head
  return student + teacher + embed * (3 * 2 * case.tokens + 2 * LOCAL['crops'] * small)


CASES = {
    'vit_tiny': Case('vit_tiny/16', 192, 3, 16),
    'vit_small': Case('vit_small/16', 384, 6, 8),
    'vit_tiny_mae': Case('vit_tiny/16', 192, 3, 4, method='mae'),
    'vit_small_mae': Case('vit_small/16', 384, 6, 4, method='mae'),
    'channel_vit_small_3': Case('channel_vit_small/16', 384, 6, 2, channels=3),
    'channel_vit_small_8': Case('channel_vit_small/16', 384, 6, 1, channels=8),
    'vit_small_simclr': Case('vit_small/16', 384, 6, 4, method='simclr'),
    'resnet50_simclr': Case('resnet50', 2048, 0, 4, method='simclr'),
    'vit_small_dinov2': Case('vit_small/16', 384, 6, 2, method='dinov2'),
}


# The two sides. Each returns a function that runs one step and waits for its end.


def jax_program(case: Case) -> tuple[Any, Any, Any, Any]:
  """jaxmed's own training step, compiled as a run compiles it: trainer, step, first state, batch."""
  import jax

  from jaxmed.parallel import mesh as mesh_lib
  from jaxmed.train.optimizer import Optimizer
  from jaxmed.train.step import Trainer

  clip = CLIP if case.method == 'dinov2' else 0.0
  optimizer = Optimizer(RATE, 1000, b1=BETAS[0], b2=BETAS[1], weight_decay=DECAY, clip=clip, clip_scope='module')
  objective, view, batch = _jax_views(case) if case.method in ('simclr', 'dinov2') else _jax_images(case)
  trainer = Trainer(objective, optimizer, view)
  mesh = mesh_lib.make_mesh({'data': 0})
  batch = jax.device_put(batch, mesh_lib.batch_sharding(mesh))
  abstract = trainer.abstract(batch, mesh)
  return trainer, trainer.compile(abstract, batch, mesh), trainer.initialize(abstract, batch), batch


def jax_step(case: Case) -> Callable[[], None]:
  """jaxmed's side of a comparison."""
  import jax
  import numpy as np

  _, step, state, batch = jax_program(case)
  box = [state]

  def run():
    box[0], metrics = step(box[0], batch)
    jax.block_until_ready((box[0], metrics))
    if not np.isfinite(metrics['loss']):
      raise FloatingPointError(f'{case.model}: loss is {metrics["loss"]}')

  return run


def _jax_images(case: Case) -> tuple[Any, Any, dict]:
  """Objective, view maker and batch of the methods that take single images."""
  import numpy as np

  from jaxmed.augment.views import ViewMaker
  from jaxmed.models import create_model
  from jaxmed.objectives import MAE, Supervised

  size = (case.size, case.size)
  if case.mae:
    encoder = create_model(case.model, size, case.channels, pos='sincos', kernel_init='xavier_uniform')
    objective = MAE(encoder, mask_ratio=MASK_RATIO, **{f'decoder_{k}': v for k, v in DECODER.items()})
  else:
    options = {'channel_attention': case.attention} if case.per_channel else {}
    objective = Supervised(create_model(case.model, size, case.channels, **options), num_classes=CLASSES,
                           label_smoothing=LABEL_SMOOTHING)
  zeros, ones = (0.0,) * case.channels, (1.0,) * case.channels
  view = ViewMaker(size, zeros, ones, 'corpus', scale=(1.0, 1.0), flip=(0.0, 0.0))
  image, label = data(case)
  channels = np.broadcast_to(np.arange(case.channels, dtype=np.int32), (case.batch, case.channels))
  return objective, view, {'image': image, 'channels': channels, 'label': label}


def _jax_views(case: Case) -> tuple[Any, Any, dict]:
  """Objective, view maker and batch of the methods that take groups of views, which are made already."""
  import numpy as np

  from jaxmed.models import create_model
  from jaxmed.objectives import DINOv2, SimCLR

  def group(image):
    channels = np.broadcast_to(np.arange(case.channels, dtype=np.int32), (*image.shape[:2], case.channels))
    return {'image': image, 'channels': channels}

  if case.method == 'simclr':
    objective = SimCLR(create_model(case.model, case.size, case.channels), out_dim=PROJECTION)
    return objective, _as_given(case), {'global': group(views(case, 2, case.size))}
  encoder = create_model(case.model, case.size, case.channels, layer_scale=1e-5, mask_token=True)
  objective = DINOv2(encoder, mask_ratio=HIDDEN, **HEAD)
  return objective, _as_given(case), {'global': group(views(case, 2, case.size)),
                                'local': group(views(case, LOCAL['crops'], LOCAL['size']))}


def _as_given(case: Case) -> Any:
  """A view maker of batches that are groups of views already; to the step it is one like any other."""
  from jaxmed.augment.views import ViewMaker

  class AsGiven(ViewMaker):
    def __call__(self, rng, batch):
      del rng
      return batch

  return AsGiven((case.size, case.size), (0.0,) * case.channels, (1.0,) * case.channels)


def torch_step(case: Case) -> Callable[[], None]:
  """The same step in PyTorch."""
  import torch

  torch.manual_seed(0)
  make = {'mae': _torch_mae_step, 'simclr': _torch_simclr, 'dinov2': _torch_dinov2}.get(case.method, _torch_supervised)
  model, loss, after = make(case)
  decayed = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
  plain = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
  groups = [{'params': decayed, 'weight_decay': DECAY}, {'params': plain, 'weight_decay': 0.0}]
  optimizer = torch.optim.AdamW(groups, RATE, BETAS, fused=True)

  def run():
    optimizer.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    if case.method == 'dinov2':
      for part in model.children():
        torch.nn.utils.clip_grad_norm_(part.parameters(), CLIP)
    optimizer.step()
    after()
    if not torch.isfinite(value):
      raise FloatingPointError(f'{case.model}: loss is {value}')

  return run


# Each gives the model, a function that computes its loss, and one that is called after the optimizer.


def _torch_supervised(case: Case) -> tuple[Any, Callable, Callable]:
  from torch.nn import functional

  image, label = _torch_data(case)
  model = _torch_channel_vit(case) if case.per_channel else _torch_vit(case)
  return model, lambda: functional.cross_entropy(model(image), label, label_smoothing=LABEL_SMOOTHING), _nothing


def _torch_mae_step(case: Case) -> tuple[Any, Callable, Callable]:
  image, _ = _torch_data(case)
  model = _torch_mae(case)
  return model, lambda: model(image), _nothing


def _torch_simclr(case: Case) -> tuple[Any, Callable, Callable]:
  """Two views through encoder and projector together, lightly's NT-Xent."""
  import timm
  from lightly.loss import NTXentLoss
  from lightly.models.modules.heads import SimCLRProjectionHead
  from torch import nn

  resnet = case.model == 'resnet50'
  encoder = timm.create_model('resnet50', num_classes=0) if resnet else _torch_vit(case, num_classes=0)
  model = nn.Sequential(encoder, SimCLRProjectionHead(case.dim, case.dim, PROJECTION, num_layers=3))
  criterion, images = NTXentLoss(temperature=0.1), _torch_views(case, 2, case.size)
  return model, lambda: criterion(*model(images).chunk(2)), _nothing


def _torch_dinov2(case: Case) -> tuple[Any, Callable, Callable]:
  """Student and teacher, one head for class tokens and patches, lightly's three losses and masked transformer."""
  import torch
  from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
  from lightly.models.modules import MaskedVisionTransformerTIMM
  from lightly.models.modules.heads import DINOProjectionHead
  from torch import nn

  def network():
    vit = _torch_vit(case, num_classes=0, dynamic_img_size=True, init_values=1e-5)
    sizes = {'output_dim' if k == 'out_dim' else k: v for k, v in HEAD.items()}
    return nn.ModuleDict({'encoder': MaskedVisionTransformerTIMM(vit, pos_embed_initialization='learn'),
                          'head': DINOProjectionHead(case.dim, norm_last_layer=False, **sizes)})

  student, teacher = network(), network().requires_grad_(False)
  teacher.load_state_dict(student.state_dict())
  images, small = _torch_views(case, 2, case.size), _torch_views(case, LOCAL['crops'], LOCAL['size'])
  mask = _torch_masks(case)
  shown = torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), mask.flatten(1)], dim=1)  # with the class token
  dino, ibot, koleo = DINOLoss(HEAD['out_dim']), IBOTPatchLoss(HEAD['out_dim']), KoLeoLoss()

  def loss():
    with torch.no_grad():
      taught = teacher['encoder'].encode(images)
      targets = teacher['head'](taught[:, 0]).chunk(2)
      patch_targets = teacher['head'](taught[shown])
    seen = student['encoder'].encode(images, mask=shown)
    local = student['encoder'].encode(small)[:, 0]
    logits = student['head'](torch.cat([seen[:, 0], local])).split(case.batch)
    spread = sum(koleo(x) for x in seen[:, 0].chunk(2))
    return (dino(list(targets), list(logits)) + ibot(patch_targets, student['head'](seen[shown]), mask) + 0.1 * spread)

  def follow():
    with torch.no_grad():
      torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - 0.992)

  return student, loss, follow


def _torch_masks(case: Case) -> Any:
  """Hidden patches [2 * batch, side, side] of the global crops: half of these, with shares over the range."""
  import torch

  side, crops = case.size // case.patch, 2 * case.batch
  mask = torch.zeros(crops, side, side, dtype=torch.bool)
  low, high = HIDDEN
  for i in range(0, crops, 2):
    share = low + (high - low) * (i + 1) / crops
    mask[i].view(-1)[: int(share * side * side)] = True
  return mask


def _torch_data(case: Case) -> tuple[Any, Any]:
  """Images [B, C, H, W] and labels."""
  import torch

  image, label = (torch.from_numpy(a) for a in data(case))
  return image.permute(0, 3, 1, 2).contiguous(), label


def _torch_views(case: Case, count: int, size: int) -> Any:
  """Views [count * B, C, size, size], all first views first."""
  import torch

  return torch.from_numpy(views(case, count, size)).permute(1, 0, 4, 2, 3).flatten(0, 1).contiguous()


def _nothing() -> None:
  pass


def _torch_vit(case: Case, num_classes: int = CLASSES, **options: Any) -> Any:
  from timm.models.vision_transformer import VisionTransformer

  return VisionTransformer(
      img_size=case.size, patch_size=case.patch, in_chans=case.channels, embed_dim=case.dim, depth=case.depth,
      num_heads=case.heads, num_classes=num_classes, **options)


def _torch_channel_vit(case: Case) -> Any:
  """ChannelViT with a linear head: projection and positions shared by all channels, channel embeddings."""
  import torch
  from timm.models.vision_transformer import Block
  from torch import nn

  class ChannelViT(nn.Module):
    def __init__(self):
      super().__init__()
      tokens = case.tokens // case.channels
      self.project = nn.Conv3d(1, case.dim, (1, case.patch, case.patch), (1, case.patch, case.patch))
      self.channel = nn.Embedding(case.channels, case.dim)
      self.cls = nn.Parameter(0.02 * torch.randn(1, 1, case.dim))
      self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + tokens, case.dim))
      self.blocks = nn.Sequential(*(Block(case.dim, case.heads, qkv_bias=True) for _ in range(case.depth)))
      self.norm = nn.LayerNorm(case.dim, eps=1e-6)
      self.head = nn.Linear(case.dim, CLASSES)

    def table(self):
      """Positions resampled at the native size too, as the official class does for more than one channel."""
      side = case.size // case.patch
      grid = self.positions[:, 1:].mT.unflatten(-1, (side, side))
      grid = nn.functional.interpolate(grid, scale_factor=(side + 0.1) / side, mode='bicubic')
      return grid.flatten(2).mT[:, None]  # [1, 1, N, D]

    def forward(self, image):
      x = self.project(image[:, None]).flatten(3).permute(0, 2, 3, 1)  # [B, C, N, D]
      x = x + self.channel.weight[None, :, None] + self.table()
      start = (self.cls + self.positions[:, :1]).expand(len(image), -1, -1)
      x = torch.cat([start, x.flatten(1, 2)], dim=1)
      return self.head(self.norm(self.blocks(x))[:, 0])

  return ChannelViT()


def _torch_mae(case: Case) -> Any:
  """Masked autoencoder on timm's blocks: random masks a sample, norm-pixel loss over hidden patches."""
  import torch
  from timm.models.vision_transformer import Block
  from torch import nn

  from jaxmed.models.layers.positions import sincos  # a NumPy table

  grid, pixels = (case.size // case.patch,) * 2, case.patch**2 * case.channels
  wide, shown = DECODER['dim'], int(case.tokens * (1 - MASK_RATIO))

  def blocks(dim, heads, depth):
    return nn.Sequential(*(Block(dim, heads, qkv_bias=True) for _ in range(depth)))

  def pick(x, index):
    return torch.gather(x, 1, index[..., None].expand(-1, -1, x.shape[-1]))

  class Autoencoder(nn.Module):
    def __init__(self):
      super().__init__()
      self.project = nn.Conv2d(case.channels, case.dim, case.patch, case.patch)
      self.register_buffer('positions', torch.from_numpy(sincos(grid, case.dim)))
      self.register_buffer('decoder_positions', torch.from_numpy(sincos(grid, wide)))
      self.cls = nn.Parameter(0.02 * torch.randn(1, 1, case.dim))
      self.hole = nn.Parameter(0.02 * torch.randn(1, 1, wide))
      self.encoder = blocks(case.dim, case.heads, case.depth)
      self.norm = nn.LayerNorm(case.dim, eps=1e-6)
      self.embed = nn.Linear(case.dim, wide)
      self.decoder = blocks(wide, DECODER['heads'], DECODER['depth'])
      self.decoder_norm = nn.LayerNorm(wide, eps=1e-6)
      self.predict = nn.Linear(wide, pixels)

    def target(self, image):
      side, patch = grid[0], case.patch
      x = image.unflatten(2, (side, patch)).unflatten(4, (side, patch))  # [B, C, g, p, g, p]
      x = x.permute(0, 2, 4, 3, 5, 1).reshape(len(image), side * side, -1)
      return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()

    def forward(self, image):
      batch = len(image)
      x = self.project(image).flatten(2).mT + self.positions
      shuffle = torch.rand(batch, case.tokens).argsort(dim=1)
      order = shuffle.argsort(dim=1)
      x = torch.cat([self.cls.expand(batch, -1, -1), pick(x, shuffle[:, :shown])], dim=1)
      x = self.embed(self.norm(self.encoder(x)))
      holes = self.hole.expand(batch, case.tokens - shown, -1)
      y = pick(torch.cat([x[:, 1:], holes], dim=1), order) + self.decoder_positions
      y = self.decoder_norm(self.decoder(torch.cat([x[:, :1], y], dim=1)))
      error = (self.predict(y[:, 1:]) - self.target(image)).square().mean(-1)
      hidden = (order >= shown).float()
      return (error * hidden).sum() / hidden.sum()

  return Autoencoder()


def data(case: Case) -> tuple[Any, Any]:
  """Images [B, H, W, C] float32 and labels [B] int64, the same for both sides."""
  import numpy as np

  rng = np.random.default_rng(0)
  image = rng.normal(size=(case.batch, case.size, case.size, case.channels)).astype(np.float32)
  return image, rng.integers(0, CLASSES, case.batch)


def views(case: Case, count: int, size: int) -> Any:
  """Views [B, count, size, size, C] float32, the same for both sides."""
  import numpy as np

  return np.random.default_rng(size).normal(size=(case.batch, count, size, size, case.channels)).astype(np.float32)


def jax_gemm() -> Callable[[], None]:
  """One large product, to measure the rate."""
  import jax
  import jax.numpy as jnp

  a = jnp.full((GEMM, GEMM), 0.5)
  product = jax.jit(jnp.matmul)
  return lambda: jax.block_until_ready(product(a, a))


def torch_gemm() -> Callable[[], None]:
  """The same in PyTorch."""
  import torch

  a = torch.full((GEMM, GEMM), 0.5)
  return lambda: torch.mm(a, a)


# The protocol: the parent writes one JSON line, the worker answers with one.


def worker(side: str, threads: int, steps: Mapping[str, Callable[[Any], Callable[[], None]]], make: Callable,
           clock: Callable[[], float] = time.perf_counter) -> None:
  """Serves 'load CASE' (its fields as JSON, or 'gemm') and 'run N' until its input ends.

  Args:
    side: 'jax' or 'torch', a key of `steps`, which make a step of the case that `make` gives for its fields.
  """
  answers, sys.stdout = sys.stdout, sys.stderr
  _limit(threads)
  if side == 'torch':
    import torch

    torch.set_num_threads(threads)
  gemm = {'jax': jax_gemm, 'torch': torch_gemm}[side]()
  run: Callable[[], None] = gemm
  for line in sys.stdin:
    verb, value = json.loads(line)
    begun = clock()
    if verb == 'load':
      run = gemm  # lets go of the case before
      run = gemm if value == 'gemm' else steps[side](make(**json.loads(value)))
      run(), run()
      times = [clock() - begun]
    else:
      times = []
      for _ in range(value):
        begun = clock()
        run()
        times.append(clock() - begun)
    print(json.dumps(times), file=answers, flush=True)


def _limit(threads: int) -> None:
  """Keeps this process on `threads` cores; XLA sizes its pool by them."""
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


class Worker:
  """One side's process: of `script`, which calls `worker` when it is asked to."""

  def __init__(self, side: str, threads: int, huge_pages: bool, script: str = __file__, name: str = '',
               more: Sequence[str] = ()):
    names = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS')
    env = dict(os.environ, JAX_PLATFORMS='cpu', OMP_WAIT_POLICY='PASSIVE', **{n: str(threads) for n in names})
    if huge_pages:
      env['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    root = os.path.dirname(os.path.dirname(os.path.abspath(script)))
    env['PYTHONPATH'] = os.pathsep.join(filter(None, [root, env.get('PYTHONPATH')]))
    command = [sys.executable, os.path.abspath(script), '--worker', side, '--threads', str(threads), *more]
    self.side = name or side
    self.process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

  def ask(self, verb: str, value: str | int) -> list[float]:
    """Sends a request and waits for the seconds."""
    assert self.process.stdin is not None
    assert self.process.stdout is not None
    self.process.stdin.write(json.dumps([verb, value]) + '\n')
    self.process.stdin.flush()
    line = self.process.stdout.readline()
    if not line:
      sys.exit(f'the {self.side} side ended during {verb} {value}, see above')
    return json.loads(line)

  def close(self) -> None:
    """Ends the process."""
    assert self.process.stdin is not None
    self.process.stdin.close()
    self.process.wait()


def compare(case: Any, sides: list[Worker], rounds: int, each: int) -> dict[str, Any]:
  """Alternates the sides for `rounds` rounds of `each` steps; which goes first alternates too.

  `case` is a dataclass with `batch` and `flops`; 'jax' and 'torch' are among the sides.
  """
  rates = {s.side: 0.0 for s in sides}
  for s in sides:
    s.ask('load', 'gemm')
    rates[s.side] = 2e-9 * GEMM**3 / min(s.ask('run', 3))
  compile_seconds = {s.side: s.ask('load', json.dumps(dataclasses.asdict(case)))[0] for s in sides}
  seconds: dict[str, list[float]] = {s.side: [] for s in sides}
  for r in range(rounds):
    for s in sides if r % 2 == 0 else sides[::-1]:
      seconds[s.side].append(min(s.ask('run', each)))
  pairs = sorted(t / j for t, j in zip(seconds['torch'], seconds['jax'], strict=True))
  mid = {side: statistics.median(times) for side, times in seconds.items()}
  return {
      'batch': case.batch, 'gflop': case.flops / 1e9,
      'ratio': statistics.median(pairs), 'ratio_low': pairs[0], 'ratio_high': pairs[-1],
      'jax_seconds': mid['jax'], 'torch_seconds': mid['torch'],
      'jax_images_per_second': case.batch / mid['jax'], 'torch_images_per_second': case.batch / mid['torch'],
      'gemm_gflops': rates, 'bound_seconds': case.flops / 1e9 / max(rates.values()),
      'load_seconds': compile_seconds, 'all_seconds': seconds,
  }


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the chosen cases and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--cases', default=','.join(CASES), help='comma-separated, of: ' + ', '.join(CASES))
  parser.add_argument('--rounds', type=int, default=5, help='alternations a case (default 5)')
  parser.add_argument('--each', type=int, default=2, help='steps a round; the faster counts (default 2)')
  parser.add_argument('--threads', type=int, default=min(2, os.cpu_count() or 1), help='cores of each side')
  parser.add_argument('--batch', type=int, default=0, help='samples a step (default: the number of each case)')
  parser.add_argument('--huge-pages', action='store_true', help='both sides use huge pages (Linux, glibc)')
  parser.add_argument('--json', default='', help='write the results here')
  parser.add_argument('--worker', choices=('jax', 'torch'), help=argparse.SUPPRESS)
  options = parser.parse_args(argv)
  if options.worker:
    worker(options.worker, options.threads, {'jax': jax_step, 'torch': torch_step}, Case)
    return
  need('parity', 'torch', 'timm', 'lightly')
  names = options.cases.split(',')
  unknown = [n for n in names if n not in CASES]
  if unknown:
    parser.error(f'unknown case {unknown[0]!r}: choose of {", ".join(CASES)}')
  sides = [Worker(side, options.threads, options.huge_pages) for side in ('jax', 'torch')]
  pages = ', huge pages' if options.huge_pages else ''
  print(f'float32, {options.threads} threads a side, {options.rounds} alternating rounds{pages}; '
        f'ratio > 1: jaxmed is faster; {measured_on()}')
  print(f'{"case":20} {"batch":>5} {"ratio":>6} {"(range)":>13} {"jaxmed s":>9} {"torch s":>8} '
        f'{"jaxmed/s":>9} {"torch/s":>8} {"GFLOP":>6} {"bound s":>8}')
  rows = []
  for name in names:
    case = dataclasses.replace(CASES[name], batch=options.batch) if options.batch else CASES[name]
    r = compare(case, sides, options.rounds, options.each)
    rows.append({'case': name, 'tokens': case.tokens, 'channels': case.channels} | r)
    spread = f'{r["ratio_low"]:.2f}-{r["ratio_high"]:.2f}'
    print(f'{name:20} {r["batch"]:5} {r["ratio"]:6.2f} {spread:>13} {r["jax_seconds"]:9.3f} '
          f'{r["torch_seconds"]:8.3f} {r["jax_images_per_second"]:9.2f} {r["torch_images_per_second"]:8.2f} '
          f'{r["gflop"]:6.0f} {r["bound_seconds"]:8.3f}', flush=True)
  for s in sides:
    s.close()
  if options.json:
    from jaxmed.files import write_json

    settings = {'on': measured_on(), 'threads': options.threads, 'rounds': options.rounds,
                'huge_pages': options.huge_pages}
    write_json(options.json, settings | {'cases': rows})


if __name__ == '__main__':
  run_script(main)
