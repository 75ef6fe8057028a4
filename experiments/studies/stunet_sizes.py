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

TRAINER = {
    'method': 'segment', 'image_size': 128, 'batch_size': 2, 'steps': 1_000_000, 'learning_rate': 1e-2,
    'eval_every': 50_000, 'checkpoint_every': 12_500, 'evaluators': 'loss,dice',
    'objective': {'decoder': 'unet', 'deep_supervision': True},
    'optimizer': {'name': 'sgd', 'b1': 0.99, 'weight_decay': 3e-5, 'clip': 12.0, 'annealing': 'poly',
                  'warmup_steps': 0},
    'augment': {'scale': (1.0, 1.0), 'brightness': 0.0, 'contrast': 0.0, 'gamma': 0.0, 'blur': 0.0, 'flip': (0.5,),
                'rotation_probability': (0.2,), 'zoom_probability': (0.2,), 'noise_probability': (0.1,),
                'soften_probability': (0.2,), 'multiply_probability': (0.15,), 'stretch_probability': (0.15,),
                'coarse_probability': (0.25,), 'inverted_power_probability': (0.1,), 'power_probability': (0.3,)},
    'loader': {'fit': 'crop', 'load_size': 128, 'foreground': 0.33},
}
SMALL = {
    'model': 'stunet_micro', 'image_size': 32, 'steps': 200, 'eval_every': 200, 'checkpoint_every': 100,
    'loader.load_size': 32, 'objective.deep_supervision': False, 'augment.flip': 0.0,  # left and right are classes
    **{f'augment.{name}_probability': (0.0,) for name in ('rotation', 'zoom', 'soften', 'coarse')},
}
WIDTHS = {f'w{w}': {'encoder.dims': (w, 2 * w, 4 * w, 8 * w)} for w in (4, 8, 16)}

STUDIES = {
    'published': Study(TRAINER, {'model': ('stunet_s', 'stunet_b', 'stunet_l', 'stunet_h')},
                       judges=('loss', 'segment')),
    'laptop': Study(TRAINER, {'width': WIDTHS, 'seed': (0, 1)}, shared=SMALL,
                    judges=('loss', {'task': 'segment', 'options': {'surface': ''}})),
}
VARIANTS = tuple(STUDIES)


def get_study(variant: str = 'published') -> Study:
  """The grid of a variant."""
  return STUDIES[variant]
