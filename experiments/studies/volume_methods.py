"""Which pretext for which task of volumes: OpenMind's comparison (Wald et al. 2024, arXiv 2412.17041).

Its claims, as a grid that can say no: what restores (MAE) is best for segmentation, what compares (SimCLR) for
classification; and VoCo's, that knowing where a crop lies helps to tell organs apart (arXiv 2402.17300). `published`
pretrains a ResEnc-L by seven methods with the same crops, steps and optimizer (experiments/openmind_mae.py) and judges
each by fine-tuning on masks, by frozen patch tokens on the same masks, and by frozen vectors on a label. Differs: one
corpus, there 114,000 volumes of brains and several sets to judge by; contrast, VoCo and Swin UNETR's method have the
options of this project, not nnssl's.

  jaxmed study experiments/studies/volume_methods.py --dry-run --topology v5p:4x4x4 --rows 114000
  jaxmed study experiments/studies/volume_methods.py:published --data heads --out study
  jaxmed prepare phantoms --subjects 60 --size 64 --out corpus
  jaxmed study experiments/studies/volume_methods.py:laptop --data corpus --out study

Not run here at full size. `laptop`: a small ViT on synthetic phantoms, three seeds, on 2 CPU cores, judged on organs
and on the phase of contrast; nothing of patients.
"""

from jaxmed.study.grid import Study

BASE = {
    'model': 'resenc_l', 'image_size': 160, 'batch_size': 8, 'steps': 250_000, 'learning_rate': 1e-2,
    'optimizer': {'name': 'sgd', 'b1': 0.99, 'weight_decay': 3e-5, 'clip': 12.0, 'annealing': 'poly',
                  'warmup_steps': 0},
    'augment': {'flip': (0.5,)}, 'loader': {'fit': 'crop', 'load_size': 160, 'normalize': 'image', 'label': 'phase'},
}
WHOLE = {'augment.scale': (1.0, 1.0)}
METHODS = {
    'mae': WHOLE | {'method': 'spark', 'objective.hide': 'zeros', 'objective.mask_ratio': 0.75,
                    'objective.mask_size': 16},
    'spark': WHOLE | {'method': 'spark', 'objective.mask_ratio': 0.75, 'objective.mask_size': 16},
    'models_genesis': WHOLE | {'method': 'models_genesis'},
    'volume_fusion': WHOLE | {'method': 'volume_fusion'},
    'simclr': {'method': 'simclr', 'augment.scale': (0.2, 1.0)},
    'voco': {'method': 'voco', 'image_size': 64, 'loader.load_size': (64, 192, 192)},
    'swin_unetr_ssl': WHOLE | {'method': 'swin_unetr_ssl', 'image_size': 96, 'loader.load_size': 96},
}
SMALL = {
    'model': 'vit_micro/8', 'image_size': 32, 'batch_size': 16, 'steps': 100, 'learning_rate': 1e-3, 'eval_every': 100,
    'checkpoint_every': 100, 'evaluators': 'loss', 'augment': {'flip': (0.0,)}, 'loader': {'label': 'phase'},
}
FEW = {
    'mae': {'method': 'mae', 'augment.scale': (0.5, 1.0)},
    'simclr': {'method': 'simclr', 'augment.scale': (0.2, 1.0)},
    'voco': {'method': 'voco', 'augment.tiles': (2, 2, 2), 'augment.views': 10},
}
FROZEN = ({'task': 'dense', 'label': 'mask'}, {'task': 'classify', 'label': 'phase', 'feature': 'mean'})

STUDIES = {
    'published': Study(BASE, {'pretext': METHODS}, judges=(
        {'task': 'finetune', 'label': 'mask', 'options': {'task': 'segment'}}, *FROZEN)),
    'laptop': Study(SMALL, {'pretext': FEW, 'seed': (0, 1, 2)}, judges=FROZEN),
}
VARIANTS = tuple(STUDIES)


def get_study(variant: str = 'published') -> Study:
  """The grid of a variant."""
  return STUDIES[variant]
