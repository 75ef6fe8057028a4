"""Whole losses and decoders beside restatements of the official code in PyTorch: values and gradients.

Each restatement names its file. Encoders and heads are left out: an objective is given their outputs. The differences
from the official code as it is stand in docs/guide/methods.md.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmed.models import create_model
from jaxmed.models.decoders.mae import Decoder
from jaxmed.models.layers import positions
from jaxmed.models.layers.tokens import Features
from jaxmed.objectives.clustering.deepcluster import DeepCluster
from jaxmed.objectives.contrastive import siamese
from jaxmed.objectives.contrastive.byol import BYOL
from jaxmed.objectives.contrastive.lejepa import LeJEPA
from jaxmed.objectives.contrastive.lvm_med import LVMMed
from jaxmed.objectives.contrastive.simclr import SimCLR
from jaxmed.objectives.distillation.dinov3 import DINOv3
from jaxmed.objectives.losses import matching
from jaxmed.objectives.losses.diversity import channel_diversity
from jaxmed.objectives.masked.mae import MAE, Masking
from jaxmed.objectives.networks import Clock
from tests.objectives import distillation_fakes, siamese_fakes

torch = pytest.importorskip('torch')
F = torch.nn.functional
RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def tensor(x):
  return torch.tensor(np.asarray(x, np.float64), requires_grad=True)


def float32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def same(have, want, relative):
  want = np.asarray(want.detach() if isinstance(want, torch.Tensor) else want, np.float64)
  np.testing.assert_allclose(np.asarray(have), want, rtol=0, atol=relative * np.abs(want).max())


def compare(ours, theirs, arrays, relative=1e-5):
  """Values and gradients with respect to each array of a dict; `theirs` takes tensors in float64."""
  tensors = {name: tensor(x) for name, x in arrays.items()}
  want = theirs(tensors)
  want.backward()
  have, grads = jax.jit(jax.value_and_grad(ours))(float32(arrays))
  same(have, want, relative)
  for name, gradient in grads.items():
    assert np.abs(tensors[name].grad.numpy()).max() > 1e-7
    same(gradient, tensors[name].grad, relative)


@pytest.fixture
def bare(monkeypatch):
  """Encoders and heads over each view give their parameters back, heads over all views what they are given."""
  monkeypatch.setattr(siamese, 'encode', lambda encoder, params, *rest: (params, {}))
  monkeypatch.setattr(siamese, 'encode_all', lambda encoder, params, *rest: (params, {}))
  monkeypatch.setattr(siamese, 'view_by_view', lambda head, params, *rest: (params, {}))
  monkeypatch.setattr(siamese, 'head_over_all_views', lambda head, params, x, train: (x, {}))


def loss_of(objective, views, count=8, target=None, extra=None, step=0):
  """A function of {'z': outputs} that is the objective's loss."""
  batch = {'global': {'image': jnp.zeros((count, views, 1, 1, 1))}, 'index': jnp.arange(count)}

  def loss(given):
    params = {'encoder': given['z'], 'projector': given['z'], 'predictor': given['z']}
    variables = {'params': params, 'target': target or {}, 'extra': extra or {}}
    return objective.loss(variables, batch, KEY, jnp.asarray(step))[0]
  return loss


def test_simclr(bare):
  """google-research/simclr, objective.py:add_contrastive_loss: the sum of the two views' cross-entropies."""
  def theirs(given):
    a, b = (F.normalize(given['z'][:, v], dim=-1) for v in (0, 1))
    own, label = 1e9 * torch.eye(8, dtype=torch.float64), torch.arange(8)
    rows = lambda x, y: torch.cat([x @ y.T / 0.1, x @ x.T / 0.1 - own], dim=1)
    return F.cross_entropy(rows(a, b), label) + F.cross_entropy(rows(b, a), label)

  objective = SimCLR(siamese_fakes.encoder('vit'), sum_views=True)
  compare(loss_of(objective, 2), theirs, {'z': RNG.normal(size=(8, 2, 6))})


def test_byol(bare):
  """deepmind-research, byol/utils/helpers.py:regression_loss, in both directions as in byol_experiment.py:loss_fn."""
  t = RNG.normal(size=(8, 2, 6))

  def theirs(given):
    far = lambda i, j: (F.normalize(given['z'][:, i], dim=-1) - F.normalize(torch.tensor(t[:, j]), dim=-1)).square().sum(-1)
    return (far(0, 1) + far(1, 0)).mean()

  target = {'encoder': 0.0, 'projector': float32(t)}
  compare(loss_of(BYOL(siamese_fakes.encoder('vit')), 2, target=target), theirs, {'z': RNG.normal(size=(8, 2, 6))})


@pytest.mark.parametrize('local', [0, 2])
def test_lejepa(bare, local):
  """rbalestr-lab/lejepa, MINIMAL.md: squared distance from the mean of the (global) views, and SIGReg."""
  drawn = np.asarray(jax.random.normal(jax.random.split(KEY)[1], (6, 16)), np.float64)
  knots = torch.linspace(0, 3, 17, dtype=torch.float64)
  normal = torch.exp(-knots.square() / 2)
  weights = torch.full((17,), 2 * 3 / 16, dtype=torch.float64)
  weights[[0, -1]] /= 2

  def theirs(given):
    z = given['z'].transpose(0, 1)  # [V, N, D]
    prediction = (z - z[:2].mean(0)).square().mean()
    x = (z @ torch.tensor(drawn / np.linalg.norm(drawn, axis=0)))[..., None] * knots
    error = (x.cos().mean(1) - normal).square() + x.sin().mean(1).square()
    return 0.98 * prediction + 0.02 * ((error * weights * normal).sum(-1) * z.shape[1]).mean()

  objective = LeJEPA(siamese_fakes.encoder('vit'), sigreg_weight=0.02, slices=16)
  compare(loss_of(objective, 2), theirs, {'z': 1.3 * RNG.normal(size=(8, 2 + local, 6))})


def clusters(bank, first):
  """facebookresearch/swav, main_deepclusterv2.py:cluster_memory for one set: centroids and labels."""
  centroids = bank[first]
  for _ in range(10):
    label = (bank @ centroids.T).argmax(dim=1)
    belongs = F.one_hot(label, len(first)).double()
    count = belongs.sum(0)
    centroids = torch.where(count[:, None] > 0, belongs.T @ bank / count.clamp(min=1)[:, None], centroids)
    centroids = F.normalize(centroids, dim=1)
  return centroids, (bank @ centroids.T).argmax(dim=1)


def test_deepcluster(bare):
  """Clusters of the bank, then main_deepclusterv2.py:train: cross-entropy of all crops with their image's cluster."""
  bank = RNG.normal(size=(2, 40, 6))
  bank /= np.linalg.norm(bank, axis=-1, keepdims=True)
  objective = DeepCluster(siamese_fakes.encoder('vit'), rows=40, num_prototypes=5, num_sets=3, out_dim=6)
  extra = {'bank': float32(bank), 'seen': jnp.ones(40, bool), 'clusterings': jnp.int32(0)}
  found = jax.jit(objective._cluster)(extra, KEY, 0)
  labels = np.array(found['assignments'])
  for s, key in enumerate(jax.random.split(KEY, 3)):  # views take turns
    first = np.asarray(jax.lax.top_k(-jax.random.uniform(key, (40,)), 5)[1])
    centroids, label = clusters(torch.tensor(bank[s % 2]), torch.tensor(first))
    same(found['centroids'][s], centroids, 1e-5)
    np.testing.assert_array_equal(labels[s], label)
  labels[0, 3] = -1  # an image of the batch that has no cluster

  def theirs(given):
    z = F.normalize(given['z'].transpose(0, 1).reshape(-1, 6), dim=1)  # crop by crop
    target = [torch.tensor(np.where(one < 0, -100, one).astype(np.int64))[:8].repeat(5) for one in labels]
    scores = [z @ torch.tensor(np.asarray(c, np.float64)).T / 0.1 for c in found['centroids']]
    return sum(map(F.cross_entropy, scores, target)) / 3

  extra = found | {'assignments': jnp.asarray(labels)}
  compare(loss_of(objective, 2, extra=extra), theirs, {'z': RNG.normal(size=(8, 5, 6))})


B, C, N, D = 2, 3, 4, 16  # of the decoders


def decoder_case(**options):
  """(decoder, random parameters, latent [B, 5, D], order [B, C * N])."""
  decoder = Decoder((2, 2), 16, C, D, 1, 2, **options)
  order = np.stack([RNG.permutation(C * N) for _ in range(B)])
  shapes = jax.eval_shape(lambda: decoder.init(KEY, *operands(jnp.zeros((B, 5, D)), order, None))['params'])
  shapes = jax.tree.map(lambda x: getattr(x, 'value', x), shapes, is_leaf=lambda x: hasattr(x, 'value'))
  return decoder, jax.tree.map(lambda x: 0.5 * RNG.normal(size=x.shape), shapes), RNG.normal(size=(B, 5, D)), order


def operands(latent, order, prefix, shared=None):
  count = latent.shape[1]
  return (prefix, latent, jnp.ones((B, count), bool), jnp.asarray(order), jnp.tile(jnp.arange(C), (B, 1)), None, shared)


def dense(x, p):
  kernel = torch.tensor(np.asarray(p['kernel']))
  x = x @ kernel.flatten(1)
  return x + torch.tensor(p['bias']).flatten() if 'bias' in p else x


def norm(x, p):
  return F.layer_norm(x, x.shape[-1:], torch.tensor(p['scale']), torch.tensor(p['bias']), 1e-6)


def heads_of(x, heads):
  return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def mlp(x, p):
  return dense(F.gelu(dense(x, p['fc1'])), p['fc2'])


def attention(q, k, v, heads):
  return F.scaled_dot_product_attention(*(heads_of(x, heads) for x in (q, k, v))).transpose(1, 2).flatten(2)


def merged(p):
  """A projection after heads [H, Dh, D] or [D, D] as one matrix."""
  return p | {'kernel': np.asarray(p['kernel']).reshape(-1, D)}


def block(x, p, heads=2):
  y = dense(norm(x, p['norm1']), p['attn']['qkv'])
  x = x + dense(attention(*y.chunk(3, dim=-1), heads), merged(p['attn']['proj']))
  return x + mlp(norm(x, p['norm2']), p['mlp'])


def filled(latent, hole, order):
  """Shown tokens, then mask tokens, in the order of the grid."""
  x = torch.cat([latent, torch.tensor(hole).expand(B, C * N - latent.shape[1], D)], dim=1)
  return torch.gather(x, 1, torch.tensor(order)[..., None].expand(-1, -1, D))


def test_ca_mae_decoder():
  """recursionpharma/maes_microscopy, mae_modules.py:CAMAEDecoder."""
  decoder, p, latent, order = decoder_case(channels='separate')
  heads = p['look_q']['kernel'].shape[2]
  weight = RNG.normal(size=(B, C * N, 16))

  def theirs(given):
    x = filled(dense(given['z'], p['embed']), p['mask_token'], order)
    x = x + torch.tensor(np.tile(np.asarray(positions.sincos((2, 2), D), np.float64), (C, 1)))
    x = x + torch.tensor(np.repeat(p['channel_embed'], N, axis=0))
    k, v = dense(norm(x, p['context_norm']), p['look_kv']).chunk(2, dim=-1)
    out = []
    for c in range(C):
      q = dense(norm(x[:, c * N : (c + 1) * N], p['query_norm']), p['look_q'])
      y = dense(attention(q, k, v, heads), merged(p['look_proj']))
      y = y + mlp(norm(y, p['out_norm']), p['mlp'])
      out.append(block(y, jax.tree.map(lambda x, c=c: x[c, 0], p['transformer']['blocks'])))
    return (dense(torch.cat(out, dim=1), p['predict']) * torch.tensor(weight)).sum()

  ours = lambda given: (decoder.apply({'params': float32(p)}, *operands(given['z'], order, None)) * weight).sum()
  compare(ours, theirs, {'z': latent}, 2e-5)


def test_cha_mae_decoder():
  """chaudatascience/cha_mae_vit, models/mae_modules.py:ChAMAEViTDecoder: three tokens before those of patches."""
  decoder, p, latent, order = decoder_case()
  table, names, weight = RNG.normal(size=(N, D)), RNG.normal(size=(C, D)), RNG.normal(size=(B, C * N, 16))

  def theirs(given):
    x = filled(dense(given['z'], p['embed']), p['mask_token'], order)
    x = x + torch.tensor(np.repeat(names, N, axis=0) + np.tile(table, (C, 1)))
    x = torch.cat([dense(given['prefix'], p['embed']), x], dim=1)
    x = norm(block(x, jax.tree.map(lambda x: x[0], p['transformer']['blocks'])), p['norm'])
    return (dense(x[:, 3:], p['predict']) * torch.tensor(weight)).sum()

  shared = float32((table, np.tile(names, (B, 1, 1))))
  ours = lambda given: (decoder.apply({'params': float32(p)}, *operands(given['z'], order, given['prefix'], shared))
                        * weight).sum()
  compare(ours, theirs, {'z': latent, 'prefix': RNG.normal(size=(B, 3, D))}, 2e-5)


def test_ca_mae_loss():
  """maes_microscopy, loss.py:FourierLoss (a channel has as many patches as a patch has pixels), 0.99 and 0.01."""
  image, hidden = RNG.normal(size=(B, 16, 16, C)), RNG.random((B, C * 16)) < 0.75
  cut = torch.tensor(image).permute(0, 3, 1, 2).unfold(2, 4, 4).unfold(3, 4, 4).reshape(B, C * 16, 16)

  def theirs(given):
    spectrum = lambda x: torch.fft.fft2(x.reshape(B, -1, 4, 4)).abs()
    spectra = (spectrum(given['z']) - spectrum(cut)).abs().mean(dim=(-1, -2))
    error = 0.99 * (given['z'] - cut).square().mean(-1) + 0.01 * spectra
    return error[torch.tensor(hidden)].mean()

  class Given(MAE):
    def _forward(self, params, batch, rng, train):
      restore, visible = jnp.zeros(hidden.shape, int), jnp.zeros((B, 1), bool)
      return None, params, Masking(restore, restore, visible, jnp.asarray(hidden, jnp.float32), None), {}

  objective = Given(create_model('channel_vit_micro/4', (16, 16), C, embed_dim=16, depth=1, num_heads=2),
                    norm_pixels=False, fourier=0.01)
  batch = {'image': float32(image), 'channels': jnp.tile(jnp.arange(C), (B, 1))}
  compare(lambda given: objective.loss({'params': given['z'], 'extra': {}}, batch, KEY, 0)[0], theirs,
          {'z': RNG.normal(size=(B, C * 16, 16))})


def test_cha_mae_channel_loss():
  """cha_mae_vit, models/loss_func.py:compute_proxy_loss: rows of the channels shown, classes of all proxies."""
  shown = np.array([0, 2, 3, 5])

  def theirs(given):
    scale = 0.1**-0.5
    x, y = (scale * F.normalize(given[name], dim=-1) for name in ('vectors', 'proxies'))
    return F.cross_entropy(-torch.cdist(x[shown], y).square(), torch.tensor(shown))

  present, every = jnp.zeros(6, bool).at[shown].set(True), jnp.ones(6, bool)
  compare(lambda given: channel_diversity(given['vectors'], given['proxies'], present, 0.1, every), theirs,
          dict(zip(('vectors', 'proxies'), RNG.normal(size=(2, 6, 8)))), 2e-5)


COUNT, LOCAL, PATCHES, WIDTH, K = 4, 3, 16, 6, 5  # of DINOv3
HIDDEN = RNG.random((2 * COUNT, PATCHES)) < 0.4
HIDDEN[3] = False


class GivenV3(DINOv3):
  """Features are the parameters, heads are matrices; the Gram teacher sees patches of twice the resolution."""

  def student_crops(self, params, batch, train, rng, **kwargs):
    every = jnp.concatenate([params['cls'], params['local']], axis=1)
    return Features(params['cls'].reshape(-1, WIDTH), None, params['patch'], grid=(4, 4)), every, {}

  def teacher_features(self, params, group, train):
    patches, grid = (params['fine'], (8, 8)) if 'fine' in group else (params['patch'], (4, 4))
    return Features(params['cls'].reshape(-1, WIDTH), None, patches, grid=grid)

  def project(self, name, params, x):
    return x @ params[name]

  def hide(self, rng, group):
    return jnp.asarray(HIDDEN)


def dinov3_loss(given, teacher, gram, temperature, local_weight, gram_weight):
  """facebookresearch/dinov3, train/ssl_meta_arch.py:compute_losses, with loss/*.py; gram: the Gram teacher's patches."""
  hidden = torch.tensor(HIDDEN)
  mean = lambda student, probs: -torch.einsum('bsk,btk->st', F.log_softmax(student / 0.1, dim=-1), probs) / COUNT
  probs = torch.tensor(distillation_fakes.sinkhorn(teacher['cls'].reshape(-1, WIDTH) @ teacher['head'], temperature))
  probs = probs.reshape(COUNT, 2, K)
  crossed = mean(given['cls'] @ given['head'], probs)
  across = (crossed.sum() - crossed.diagonal().sum()) / 2
  local = mean(given['local'] @ given['head'], probs).mean()
  terms = 2 + 2 * LOCAL  # pairs of global crops, and of a local with a global one
  loss = 2 / terms * across + 2 * LOCAL / terms * local_weight * local
  for v in range(2):
    x = F.normalize(given['cls'][:, v], dim=-1)
    near = (x @ x.T).fill_diagonal_(-1).argmax(dim=1)
    loss = loss - 0.1 * torch.log(torch.nn.PairwiseDistance(eps=1e-8)(x, x[near]) + 1e-8).mean()
  target = torch.tensor(distillation_fakes.sinkhorn(teacher['patch'][HIDDEN] @ teacher['patch_head'], temperature))
  each = -(target * F.log_softmax(given['patch'][hidden] @ given['patch_head'] / 0.1, dim=-1)).sum(-1)
  share = (1 / hidden.sum(-1).clamp(min=1))[:, None].expand_as(hidden)[hidden]
  loss = loss + (each * share).sum() / len(HIDDEN)
  matrix = lambda x: F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).transpose(1, 2)
  image = torch.tensor(gram).transpose(1, 2).unflatten(2, (8, 8))
  coarse = F.interpolate(image, size=(4, 4), mode='bicubic', align_corners=False).flatten(2).transpose(1, 2)
  return loss + gram_weight * F.mse_loss(matrix(given['patch']), matrix(coarse))


@pytest.mark.parametrize('step', [0, 120, 700])
def test_dinov3(step):
  """The whole loss, with the ramps of the Gram stage (train/cosine_lr_scheduler.py:linear_warmup_cosine_decay)."""
  draw = lambda *shape: RNG.normal(size=shape)
  features = lambda: {'cls': draw(COUNT, 2, WIDTH), 'patch': draw(2 * COUNT, PATCHES, WIDTH),
                      'head': 0.7 * draw(WIDTH, K), 'patch_head': 0.7 * draw(WIDTH, K)}
  student, teacher, gram = features() | {'local': draw(COUNT, LOCAL, WIDTH)}, features(), draw(2 * COUNT, 64, WIDTH)
  objective = GivenV3(
      distillation_fakes.encoder('vit', mask_token=True), out_dim=K, clock=Clock(1000, 10.0), start_temperature=0.3,
      teacher_temperature=0.4, gram_weight=2.0, gram_start=0, gram_warmup=200, gram_every=0, local_weight=0.5,
      start_local_weight=1.0, local_warmup=200, mask_ratio=(0.1, 0.9))
  encoder = {'cls': teacher['cls'], 'patch': teacher['patch'], 'fine': gram}
  rest = {'target': float32(teacher | {'encoder': encoder}), 'extra': float32({'gram': encoder})}
  group = {'image': jnp.zeros((COUNT, 2, 16, 16, 2)), 'channels': jnp.zeros((COUNT, 2, 2), jnp.int32)}
  batch = {'global': group, 'gram': group | {'fine': jnp.zeros(())}}
  ramp = 0.5 * (1 - np.cos(np.pi * min(step / 199, 1)))
  temperature = float(objective.temperature(jnp.asarray(step)))
  compare(lambda params: objective.loss(rest | {'params': params}, batch, KEY, jnp.asarray(step))[0],
          lambda given: dinov3_loss(given, teacher, gram, temperature, 1 - 0.5 * ramp, 2 * ramp), student)


def test_lvm_med():
  """duyhominhnguyen/Exgra-Med, llava/model/llava_pre.py: cosines of vertices and of edges, and the Hamming loss."""
  a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in RNG.normal(size=(2, 6, 8)))
  near = [np.array(matching.neighbors(float32(x), 3)) for x in (a, b)]
  weights = RNG.random((6, 6)), RNG.random((6, 3, 6, 3))
  objective = LVMMed(siamese_fakes.encoder('vit'), local_weight=0.0)

  def theirs(given):
    edges = [F.normalize((x[:, None] - x[n]).flatten(0, 1), dim=1) for x, n in zip((given['a'], given['b']), near)]
    edge = 0.5 * (edges[0] @ edges[1].T).reshape(6, 3, 6, 3)
    return (given['a'] @ given['b'].T * torch.tensor(weights[0])).sum() + (edge * torch.tensor(weights[1])).sum()

  def ours(given):
    graphs = [{'nodes': given[name], 'near': jnp.asarray(n)} for name, n in zip('ab', near)]
    return sum((x * w).sum() for x, w in zip(objective._affinities(*graphs), weights))

  compare(ours, theirs, {'a': a, 'b': b})
  order = RNG.permutation(6)
  found, truth = np.eye(6)[order], np.eye(6)
  errors = found * (1 - truth) + (1 - found) * truth
  assert float(matching.hamming(jnp.asarray(order))) / 6 == pytest.approx(errors.mean(axis=0).sum())
