"""Held-out loss of MAE over width, records and compute, in the form of Hoffmann et al. 2022 (arXiv 2203.15556).

The question is that of Xie et al. 2023 (arXiv 2206.04664) for masked image modelling, here with MAE's own recipe (He et
al. 2022, arXiv 2111.06377): does the loss on held-out images fall as E + A N^-a + B D^-b with parameters N and records
D, and does the law of small cells foretell the large ones? Neither paper fits this law to MAE: nothing published is
reproduced here but the recipe. Subsets are whole subjects, each inside the next larger one.

  jaxmed study experiments/studies/scaling_mae.py --dry-run --topology v5e:16x16 --rows 1281167
  jaxmed prepare demo --out corpus
  jaxmed study experiments/studies/scaling_mae.py:laptop --data corpus --out study --jobs 2
  jaxmed study fit study

`published`: ViT-Ti to ViT-H at the recipe's 800 epochs of ImageNet-1k, subsets for as many steps; not run here.
`compute`: the same sizes, all records, at four budgets. `laptop`: four widths of a ChannelViT, four subsets, two seeds
at equal steps; `laptop_compute`: four widths at four budgets. Both take minutes on 2 CPU cores, and say what cells of
that size can: slices of one brain.
"""

from jaxmed.study import rules
from jaxmed.study.grid import Study

VARIANTS = ('published', 'compute', 'laptop', 'laptop_compute')
SIZES = ('vit_tiny/16', 'vit_small/16', 'vit_base/16', 'vit_large/16', 'vit_huge/16')
WIDTHS = {f'w{w}': {'encoder.embed_dim': w, 'encoder.num_heads': w // 32} for w in (32, 64, 128, 192)}
SMALL = {'steps': 240, 'eval_every': 240, 'checkpoint_every': 60, 'evaluators': 'loss', 'encoder.depth': 3,
         'loader.sources': 'icbm152'}  # the brain: all records have the same channels, as the held-out ones do
STUDIES = {
    'published': Study(
        'experiments/mae.py', {'model': SIZES, 'samples': (20_000, 80_000, 320_000, 'all')}, shared={'seed': 0}),
    'compute': Study(
        'experiments/mae.py', {'model': SIZES, 'budget': (1e18, 1e19, 1e20, 1e21)},
        rules=(rules.warmup(0.05),), shared={'seed': 0}),
    'laptop': Study(
        'experiments/mae.py:laptop', {'width': WIDTHS, 'samples': (250, 700, 2000, 'all'), 'seed': (0, 1)},
        shared=SMALL),
    'laptop_compute': Study(
        'experiments/mae.py:laptop', {'width': WIDTHS, 'budget': (2e11, 5e11, 1.2e12, 3e12)}, shared=SMALL),
}


def get_study(variant: str = 'published') -> Study:
  """The grid of a variant."""
  return STUDIES[variant]
