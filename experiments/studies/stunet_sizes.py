"""STU-Net's sizes: Dice of whole volumes over the width and depth of a U-Net (Huang et al. 2023, arXiv 2304.06716).

`published` trains S, B, L and H from scratch as uni-medical/STU-Net, STUNetTrainer.py, does on TotalSegmentator: crops
of 128^3, 2 volumes a step, SGD (Nesterov 0.99) at 1e-2, decay 3e-5, (1 - t)^0.9 over 4,000 epochs of 250 steps, deep
supervision, mirrored axes, crops forced to show a class as nnU-Net does. Published on its test split: 90.06 mean Dice
of H (project page). Differs: the views are jaxmed's list of nnU-Net's, see the guide of views.

  jaxmed study experiments/studies/stunet_sizes.py --dry-run --topology v5p:4x4x4 --rows 1082
  jaxmed prepare TOTALSEGMENTATOR --layout totalsegmentator --spacing 1.5 --volumes whole --out corpus
  jaxmed study experiments/studies/stunet_sizes.py:published --data corpus --out study
  jaxmed prepare phantoms --size 48 --subjects 24 --out corpus
  jaxmed study experiments/studies/stunet_sizes.py:laptop --data corpus --out study

Not run here at full size. `laptop`: three widths of a small STU-Net on synthetic phantoms of the abdomen, two seeds, on
2 CPU cores; what it shows is that the axis runs, and nothing of patients.
"""

from jaxmed.study.grid import Study

BASE = 'experiments/finetune_segment.py:nnunet'  # the same trainer
LONG = {'steps': 1_000_000, 'eval_every': 50_000}
SMALL = {
    'model': 'stunet_micro', 'image_size': 32, 'steps': 200, 'eval_every': 200, 'checkpoint_every': 100,
    'loader.load_size': 32, 'objective.deep_supervision': False, 'augment.flip': 0.0,  # left and right are classes
    **{f'augment.{name}_probability': (0.0,) for name in ('rotation', 'zoom', 'soften', 'coarse')},
}
WIDTHS = {f'w{w}': {'encoder.dims': (w, 2 * w, 4 * w, 8 * w)} for w in (4, 8, 16)}

STUDIES = {
    'published': Study(BASE, {'model': ('stunet_s', 'stunet_b', 'stunet_l', 'stunet_h')}, shared=LONG,
                       judges=('loss', 'segment')),
    'laptop': Study(BASE, {'width': WIDTHS, 'seed': (0, 1)}, shared=SMALL,
                    judges=('loss', {'task': 'segment', 'options': {'surface': ''}})),
}
VARIANTS = tuple(STUDIES)


def get_study(variant: str = 'published') -> Study:
  """The grid of a variant."""
  return STUDIES[variant]
