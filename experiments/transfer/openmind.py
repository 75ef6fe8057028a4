"""OpenMind's protocol for a 3D encoder: fine-tuning of the encoder alone (Wald et al. 2024, arXiv 2412.17041).

Reproduces MIC-DKFZ/nnUNet, nnUNetTrainer/pretraining/pretrainedTrainer.py: encoder and stem are transferred, the
decoder is fresh; crops of 160^3, 2 volumes a step, no deep supervision, SGD (Nesterov 0.99), decay 3e-5, gradients of
at most 12, 1e-3 for pretrained weights and 1e-2 for its control from scratch, a linear rise over the first 50 of 1000
epochs of 250 steps, then (1 - t)^0.9. `short` has its 150 epochs with a rise over 15. The control has its own best rate
here: 1e-2 and 3e-3 are tried, and the better one on val is judged. The arm `nnunet` is its third line: nnU-Net's own
training from scratch with deep supervision, no rise and crops of 128^3. Three seeds, Dice of whole volumes.

  jaxmed transfer experiments/transfer/openmind.py --data atlas:MR=ATLAS --data brats:MR=BRATS --encoder RUN --out OUT
  jaxmed prepare tissue --out tissue && jaxmed prepare regions --out regions
  jaxmed train --data tissue --out pre method=simclr model=resenc_micro image_size=48 steps=200
  jaxmed transfer experiments/transfer/openmind.py:laptop --data tissue=tissue --data regions=regions \\
      --encoder pre --out OUT

Differs: seeds instead of folds; crops are read at their own size, see experiments/finetune_segment.py. Prepare the
corpora at the spacing of pretraining (--spacing 1), which is its recommended mode. Published: MAE is the best of its
methods for segmentation, contrastive ones for classification (project page). A Primus has other rates (AdamW at 1e-4,
from scratch 3e-4): change the values of `base` in a copy. Not run here at full size. `laptop`: slices of one real T1
template, a small ResEnc, a rise over a twentieth of the run; not run to its end.
"""

from jaxmed.study.transfer import Transfer

BASE = 'experiments/finetune_segment.py'
NNUNET = {
    'kind': 'scratch', 'rates': (1e-2,), 'values': {
        'model': 'resenc_l', 'image_size': 128, 'loader.load_size': 128, 'objective.deep_supervision': True,
        'optimizer.warmup_steps': 0}}
ARMS = {'pretrained': {'rates': (1e-3,)}, 'scratch': {'rates': (1e-2, 3e-3)}}
SMALL = {
    'image_size': 48, 'loader': {'fit': 'auto', 'load_size': 48, 'foreground': 0.0}, 'batch_size': 16, 'steps': 60,
    'eval_every': 20, 'checkpoint_every': 20, 'optimizer.warmup_steps': 3,
    **{f'augment.{name}_probability': (0.0,) for name in ('rotation', 'zoom', 'soften', 'coarse')}}

TRANSFERS = {
    'published': Transfer({'*': {}}, ARMS | {'nnunet': NNUNET}, f'{BASE}:published', seeds=(0, 1, 2)),
    'short': Transfer({'*': {}}, ARMS, f'{BASE}:short', seeds=(0, 1, 2)),
    'laptop': Transfer({'tissue': {'modality': 'MR'}, 'regions': {'modality': 'MR'}}, ARMS, f'{BASE}:published', SMALL),
}
VARIANTS = tuple(TRANSFERS)


def get_transfer(variant: str = 'published') -> Transfer:
  """What a variant declares."""
  return TRANSFERS[variant]
