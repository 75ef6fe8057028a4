"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of a batch with its mirror, as timm's batch mode does."""

import jax
import jax.numpy as jnp


def mix(rng: jax.Array, image: jax.Array, target: jax.Array, channels: jax.Array, mixup_alpha: float,
        cutmix_alpha: float) -> tuple[jax.Array, jax.Array]:
  """Mixes sample i with sample B-1-i where both have the same channels.

  One lambda ~ Beta(alpha, alpha) a batch; with both kinds switched on, each batch takes one of them with
  probability 0.5. CutMix pastes a box of share 1 - lambda, clipped at the border, and lambda follows the clipped
  area.

  Args:
    image: [B, *grid, C]; target: [B, K] class probabilities; channels: [B, C] ids.
    mixup_alpha, cutmix_alpha: 0 switches that kind off.
  Returns:
    The mixed image and target.
  """
  if not (mixup_alpha or cutmix_alpha):
    return image, target
  keys = jax.random.split(rng, 4)
  paste = bool(cutmix_alpha) & (jax.random.bernoulli(keys[0]) if mixup_alpha and cutmix_alpha else True)
  lam_mix = jax.random.beta(keys[1], mixup_alpha, mixup_alpha) if mixup_alpha else jnp.ones(())
  lam_cut = jax.random.beta(keys[2], cutmix_alpha, cutmix_alpha) if cutmix_alpha else jnp.ones(())
  box, lam_cut = _box(keys[3], image.shape[1:-1], lam_cut)  # [*grid, 1] bool
  share = jnp.where(paste, 1.0 - box, lam_mix)  # what stays of each pixel
  same = jnp.all(channels == channels[::-1], axis=1)
  expand = lambda x, rank: x.reshape(-1, *[1] * (rank - 1))
  share = jnp.where(expand(same, image.ndim), share, 1.0)
  lam = jnp.where(same, jnp.where(paste, lam_cut, lam_mix), 1.0)[:, None]
  mixed = image * share + image[::-1] * (1 - share)
  return mixed, target * lam + target[::-1] * (1 - lam)


def _box(rng: jax.Array, grid: tuple[int, ...], lam: jax.Array) -> tuple[jax.Array, jax.Array]:
  """A box of about share 1 - lam as [*grid, 1] float (1 inside), and the share outside of it."""
  inside = jnp.ones((), bool)
  for axis, (n, key) in enumerate(zip(grid, jax.random.split(rng, len(grid)), strict=True)):
    length = jnp.floor(n * (1 - lam) ** (1 / len(grid)))
    centre = jax.random.randint(key, (), 0, n)
    low = jnp.clip(centre - length // 2, 0, n)
    high = jnp.clip(centre + length // 2, 0, n)
    index = jnp.arange(n)
    inside = inside & ((index >= low) & (index < high)).reshape([-1 if a == axis else 1 for a in range(len(grid))])
  box = inside.astype(jnp.float32)[..., None]
  return box, 1 - box.mean()
