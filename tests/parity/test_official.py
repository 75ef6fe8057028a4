"""Whole losses and decoders beside restatements of the official code in PyTorch: values and gradients.

Each restatement names its file. Encoders and heads are left out, but for CA-MAE's: an objective is given their outputs.
The differences from the official code as it is stand in docs/guide/methods.md.
"""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxmed import config
from jaxmed.augment.intensity import normalize
from jaxmed.models import create_model
from jaxmed.models.decoders.mae import Decoder
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
from jaxmed.objectives.networks import Clock, encode_shown
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
  x = x @ torch.as_tensor(p['kernel']).flatten(1)
  return x + torch.as_tensor(p['bias']).flatten() if 'bias' in p else x


def norm(x, p):
  return F.layer_norm(x, x.shape[-1:], torch.as_tensor(p['scale']), torch.as_tensor(p['bias']), 1e-6)


def heads_of(x, heads):
  return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def mlp(x, p):
  return dense(F.gelu(dense(x, p['fc1'])), p['fc2'])


def attention(q, k, v, heads):
  return F.scaled_dot_product_attention(*(heads_of(x, heads) for x in (q, k, v))).transpose(1, 2).flatten(2)


def merged(p):
  """A projection after heads [H, Dh, D] or [D, D] as one matrix."""
  return p | {'kernel': p['kernel'].reshape(-1, D)}


def block(x, p, heads=2):
  """timm's Block, with LayerScale where there is one."""
  y = dense(norm(x, p['norm1']), p['attn']['qkv'])
  x = x + p.get('ls1', 1) * dense(attention(*y.chunk(3, dim=-1), heads), merged(p['attn']['proj']))
  return x + p.get('ls2', 1) * mlp(norm(x, p['norm2']), p['mlp'])


def filled(latent, hole, order):
  """Shown tokens, then mask tokens, in the order of the grid."""
  order = torch.as_tensor(order)
  x = torch.cat([latent, torch.as_tensor(hole).expand(B, order.shape[1] - latent.shape[1], D)], dim=1)
  return torch.gather(x, 1, order[..., None].expand(-1, -1, D))


def ca_mae_positions(count, dim):
  """vit.py:6-69, generate_2d_sincos_pos_embeddings of `count` patches of each channel, without the class token's zeros.

  The first half is of the height; here as in MAE it is of the width, so the halves change places.
  """
  weights = 1 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
  places = torch.meshgrid(*[torch.arange(count**0.5, dtype=torch.float64)] * 2, indexing='ij')
  height, width = (torch.outer(place.flatten(), weights) for place in places)
  return torch.cat([height.sin(), height.cos(), width.sin(), width.cos()], dim=1).roll(dim // 2, dims=1).repeat(C, 1)


def ca_mae_masked(noise, ratio):
  """masking.py:7-52, transformer_random_masking: tokens kept, the rank of each token, and 1 where it is hidden."""
  order = torch.argsort(noise, dim=1)
  rank, keep = torch.argsort(order, dim=1), int(noise.shape[1] * (1 - ratio))
  return order[:, :keep], rank, (rank >= keep).double()


def ca_mae_encoded(image, p, keep):
  """Tokens [B, 1 + K, D] of images [B, C, H, W]: mae_modules.py:57-77, MAEEncoder.forward_masked, over timm's Block.

  With vit.py:94-100, ChannelAgnosticPatchEmbed.forward, and vit.py:104-124, ChannelAgnosticViT._pos_embed.
  """
  kernel = p['patch_embed']['kernel'].T.reshape(D, 1, 4, 4)
  each = [F.conv2d(image[:, c : c + 1], kernel, p['patch_embed']['bias'], stride=4) for c in range(C)]
  x = torch.stack(each, dim=2).flatten(2).transpose(1, 2)
  x = x + ca_mae_positions(x.shape[1] // C, D)
  x = torch.gather(x, 1, keep[..., None].expand(-1, -1, D))
  x = torch.cat([p['cls_token'].expand(B, 1, D), x], dim=1)
  for i in range(2):
    x = block(x, jax.tree.map(lambda x, i=i: x[i], p['transformer']['blocks']))
  return norm(x, p['norm'])


def ca_mae_decoded(latent, p, order):
  """Pixels of all tokens from those kept: mae_modules.py:132-171, CrossAttention of 8 heads; 174-276, CAMAEDecoder."""
  x, count = filled(dense(latent, p['embed']), p['mask_token'], order), order.shape[1] // C
  x = x + ca_mae_positions(count, D) + torch.as_tensor(p['channel_embed']).repeat_interleave(count, dim=0)
  k, v = dense(norm(x, p['context_norm']), p['look_kv']).chunk(2, dim=-1)
  out = []
  for c in range(C):
    q = dense(norm(x[:, c * count : (c + 1) * count], p['query_norm']), p['look_q'])
    y = dense(attention(q, k, v, 8), merged(p['look_proj']))
    y = y + mlp(norm(y, p['out_norm']), p['mlp'])
    out.append(block(y, jax.tree.map(lambda x, c=c: x[c, 0], p['transformer']['blocks'])))
  return dense(torch.cat(out, dim=1), p['predict'])


def ca_mae_error(predicted, image, hidden, normalised, weight):
  """mae.py:MAE.compute_MAE_loss @ 3dd1085, with its mae_utils.py:apply_norm_pix, and loss.py:25-59, FourierLoss.

  Of a channel with as many patches as a patch has pixels: otherwise the view of FourierLoss cuts across patches.
  """
  cut = image.unfold(2, 4, 4).unfold(3, 4, 4).reshape(B, -1, 16)  # mae_utils.py:29-31, flatten_images
  if normalised:
    cut = (cut - cut.mean(-1, keepdim=True)) / (cut.var(-1, keepdim=True) + 1e-6).sqrt()
  over_hidden = lambda error: (error.mean(dim=-1) * hidden).sum() / hidden.sum()
  side = int((cut.shape[1] // C) ** 0.5)
  spectrum = lambda x: torch.fft.fft2(x.reshape(B, 16 * C, side, side)).abs()
  spectra = (spectrum(predicted) - spectrum(cut)).abs().reshape(B, -1, 16)
  return (1 - weight) * over_hidden((predicted - cut).square()) + weight * over_hidden(spectra)


def test_ca_mae_decoder():
  """recursionpharma/maes_microscopy @ b3e68bb, mae_modules.py:CAMAEDecoder."""
  decoder, p, latent, order = decoder_case(channels='separate')
  aim = RNG.normal(size=(B, C * N, 16))
  ours = lambda given: decoder.apply({'params': float32(p)}, *operands(given['z'], order, None))
  theirs = lambda given: ca_mae_decoded(given['z'], p, order)
  same(ours(float32({'z': latent})), theirs({'z': tensor(latent)}), 1e-6)
  compare(lambda given: jnp.square(ours(given) - aim).mean(),
          lambda given: (theirs(given) - torch.tensor(aim)).square().mean(), {'z': latent}, 1e-6)


RECIPE = config.load_file(str(pathlib.Path(__file__).parents[2] / 'experiments' / 'ca_mae.py'))


def ca_mae_case():
  """(the recipe's objective and encoder, tiny, of 2 blocks; a batch; random parameters as a flat dict).

  Channel embeddings of the encoder, which the official one lacks, are 0 and not among the parameters.
  """
  encoder = create_model('channel_vit_micro/4', (16, 16), C, embed_dim=D, depth=2, num_heads=2, **RECIPE['encoder'])
  small = {'decoder_dim': D, 'decoder_depth': 1, 'decoder_heads': 2}
  objective = MAE(encoder, **RECIPE['objective'] | small)
  image = RNG.normal(size=(B, 16, 16, C))
  batch = {'image': float32(image), 'channels': jnp.tile(jnp.arange(C), (B, 1))}
  shapes = nn.unbox(jax.eval_shape(lambda: objective.init(KEY, batch)['params']))
  flat = flatten_dict(shapes, sep='/')
  del flat['encoder/channel_embed']
  return objective, batch, image, {name: 0.4 * RNG.normal(size=x.shape) for name, x in flat.items()}


def whole(flat):
  return unflatten_dict({'encoder/channel_embed': jnp.zeros((C, D))} | flat, sep='/')


def ca_mae_noise():
  """What sorts the tokens of `ca_mae_case` in MAE.loss."""
  return torch.tensor(np.asarray(jax.random.uniform(jax.random.split(KEY)[0], (B, C * 16))))


@pytest.mark.parametrize('ratio', [0.75, 0.5, 0.3])
def test_ca_mae_masks(ratio):
  """maes_microscopy @ b3e68bb, masking.py:transformer_random_masking: all channels' tokens are sorted together."""
  objective, batch, *_ = ca_mae_case()
  masking = dataclasses.replace(objective, mask_ratio=ratio)._mask(jax.random.split(KEY)[0], batch)
  for have, want in zip((masking.ids_keep, masking.ids_restore, masking.hidden), ca_mae_masked(ca_mae_noise(), ratio)):
    np.testing.assert_array_equal(have, want)
  assert masking.visible.all() and masking.decoder_valid is None


def test_ca_mae_standardised():
  """maes_microscopy @ b3e68bb, mae_modules.py:19-28, SelfStandardize, whose 1e-5 beside the variance is taken out."""
  stored = RNG.integers(0, 256, (B, 16, 16, C))
  x = torch.tensor(stored).permute(0, 3, 1, 2).double() / 255
  want = F.instance_norm(x) * (1 + 1e-5 / x.var(dim=(2, 3), keepdim=True, correction=0)).sqrt()
  have = normalize(jnp.asarray(stored, jnp.uint8), jnp.zeros((B, C), int), jnp.zeros(1), jnp.ones(1), 'image')
  same(have, want.permute(0, 2, 3, 1), 1e-6)


def test_ca_mae_encoder():
  """maes_microscopy @ b3e68bb, mae_modules.py:MAEEncoder.forward_masked: class token and tokens kept."""
  objective, batch, image, arrays = ca_mae_case()
  arrays = {name: x for name, x in arrays.items() if name.startswith('encoder/')}
  keep = ca_mae_masked(ca_mae_noise(), 0.75)[0]
  aim, pixels = RNG.normal(size=(B, 1 + keep.shape[1], D)), torch.tensor(image).permute(0, 3, 1, 2)

  def ours(given):
    latent, _ = encode_shown(objective.encoder, whole(given)['encoder'], batch, jnp.asarray(keep), None, False, {})
    return jnp.concatenate([latent.cls[:, None], latent.patches], axis=1)

  theirs = lambda given: ca_mae_encoded(pixels, whole(given)['encoder'], keep)
  same(ours(float32(arrays)), theirs(jax.tree.map(tensor, arrays)), 1e-6)
  compare(lambda given: jnp.square(ours(given) - aim).mean(),
          lambda given: (theirs(given) - torch.tensor(aim)).square().mean(), arrays, 1e-6)


@pytest.mark.parametrize('normalised', [False, True])
def test_ca_mae(normalised):
  """Masks, encoder, decoder and both errors of maes_microscopy in one: the loss by every weight of the recipe."""
  objective, batch, image, arrays = ca_mae_case()
  objective = dataclasses.replace(objective, norm_pixels=normalised)
  keep, rank, hidden = ca_mae_masked(ca_mae_noise(), 0.75)
  pixels = torch.tensor(image).permute(0, 3, 1, 2)

  def theirs(given):
    p = whole(given)
    latent = ca_mae_encoded(pixels, p['encoder'], keep)
    return ca_mae_error(ca_mae_decoded(latent[:, 1:], p['decoder'], rank), pixels, hidden, normalised, 0.01)

  compare(lambda given: objective.loss({'params': whole(given), 'extra': {}}, batch, KEY, 0, train=False)[0], theirs,
          arrays, 1e-6)


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
