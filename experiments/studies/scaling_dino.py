"""Held-out loss of DINO over width, records and compute (DINO: Caron et al. 2021, arXiv 2104.14294).

The grid of scaling_mae.py with DINO's recipe. The loss is against the run's own teacher, which moves with it: between
widths it is no measure of quality, as a teacher that says little is easily followed. So a probe judges beside it, and a
law is to be fitted to that (`--loss`), not to the loss. Nothing published is reproduced but the recipe.

  jaxmed study experiments/studies/scaling_dino.py --dry-run --topology v5e:16x16 --rows 1281167
  jaxmed prepare demo --out corpus
  jaxmed study experiments/studies/scaling_dino.py:laptop --data corpus --out study --jobs 2

`published`: ViT-Ti to ViT-B at the recipe's 300 epochs, subsets for as many steps; not run here. `compute`: the same
sizes at four budgets. `laptop`: three widths of a ChannelViT, three subsets, two seeds; minutes on 2 CPU cores.
"""

from jaxmed.study import rules
from jaxmed.study.grid import Study

VARIANTS = ('published', 'compute', 'laptop')
SIZES = ('vit_tiny/16', 'vit_small/16', 'vit_base/16')
WIDTHS = {f'w{w}': {'encoder.embed_dim': w, 'encoder.num_heads': w // 32} for w in (32, 64, 128)}
STUDIES = {
    'published': Study(
        'experiments/dino.py', {'model': SIZES, 'samples': (20_000, 80_000, 320_000, 'all')}, shared={'seed': 0}),
    'compute': Study(
        'experiments/dino.py', {'model': SIZES, 'budget': (1e18, 1e19, 1e20)}, rules=(rules.warmup(0.05),),
        shared={'seed': 0}),
    'laptop': Study(
        'experiments/dino.py:laptop', {'width': WIDTHS, 'samples': (250, 1000, 'all'), 'seed': (0, 1)},
        judges=('loss', {'task': 'classify', 'label': 'region'}),
        shared={'steps': 120, 'eval_every': 120, 'checkpoint_every': 40, 'evaluators': 'loss,health',
                'encoder.depth': 3, 'augment.local_views': 2, 'loader.sources': 'icbm152'}),
}


def get_study(variant: str = 'published') -> Study:
  """The grid of a variant."""
  return STUDIES[variant]
