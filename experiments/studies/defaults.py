"""Which method, model, rate and length pay where the user names none: the study behind the defaults of `train`.

  python tools/small_corpora.py corpora
  jaxmed study experiments/studies/defaults.py:rgb --data corpora/rgb --out study_rgb
  jaxmed study experiments/studies/defaults.py:rgb_methods --data corpora/rgb --out study_rgb_methods

A variant is a kind of data (`rgb`, `gray`, `fluorescence`, `channels`, `volumes`: see tools/small_corpora.py) and
what is asked: alone, the defaults as they are, three seeds; `_methods`, some that compare or mask views, at the
default length; `_models`, encoders; `_rates`, learning rates; `_lengths`, passes over the records; `_views`, the
least area of a crop. Each cell is judged by kNN and the logistic probe on places that training did not see, beside
its untrained encoder and pixels by PCA (CELL/classify.json has the paired intervals). docs/results/defaults.md tells
what was found: of the study itself seed 0 of the defaults was run, and nothing of the other variants.
"""

from jaxmed.study.grid import Study

LABELS = {'rgb': 'tissue', 'gray': 'region', 'fluorescence': 'depth', 'channels': 'relation', 'volumes': 'region'}
METHODS = ('simclr', 'mae', 'lejepa', 'vicreg', 'mocov3', 'byol', 'barlow', 'dino')
AXES = {
    '': {'seed': (0, 1, 2)},
    '_methods': {'method': METHODS, 'seed': (0,)},
    '_models': {'model': ('channel_vit_micro/8', 'vit_micro/8', 'resnet_micro', 'convnextv2_micro'), 'seed': (0,)},
    '_rates': {'learning_rate': (3e-4, 9e-4, 2e-3), 'seed': (0,)},
    '_lengths': {'epochs': (2.0, 5.0, 10.0, 20.0), 'seed': (0,)},
    '_views': {'least': {'a08': {'augment.scale': (0.08, 1.0)}, 'a20': {'augment.scale': (0.2, 1.0)},
                         'a40': {'augment.scale': (0.4, 1.0)}}, 'seed': (0,)},
}
VARIANTS = tuple(f'{kind}{asked}' for kind in LABELS for asked in AXES)


def get_study(variant: str = 'rgb') -> Study:
  """The grid of a variant."""
  kind, _, asked = variant.partition('_')
  return Study({}, AXES[f'_{asked}' if asked else ''], shared={'evaluators': 'health'},
               judges=({'task': 'classify', 'label': LABELS[kind]},))
