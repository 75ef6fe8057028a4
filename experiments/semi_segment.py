"""Segmentation with few masks by anatomically-aware uncertainty (Adiga et al. 2023, arXiv 2310.16099).

Reproduces adigasu/Anatomically-aware_Uncertainty_for_Semi-supervised_Segmentation, code_DAE_MT/
train_Abdomen_meanteacher_DAE_certainty.py: 26 of 260 volumes of FLARE 2021 have masks, 2 of 4 crops of a step have,
SGD at 0.1 with decay 1e-4 along a cosine of 8000 steps, teacher of momentum 0.99, consistency up to 0.1 in 40 jumps,
gamma 1. Differs: the network is nnU-Net's of a V-Net's widths (skips are concatenated, stages stride by convolutions
of 3, no dropout of 0.5 at the bottom and the top), its teacher starts as a copy, SGD is Nesterov's, crops are flipped
along both axes of a slice and not turned by right angles, the cosine ends at the rate that theirs, of 2000 steps more,
has then, intensities are normalised by all pixels (there by those above the first percentile).

The label autoencoder comes first; without `towers.labels.init` it is a plain mean teacher.

  jaxmed train experiments/semi_segment.py --data VOLUMES --out RUN towers.labels.init=LABELS image_size=96,144,144 \
      loader.load_size=96,144,144
  jaxmed train experiments/label_autoencoder.py:laptop --data tissue --out LABELS
  jaxmed train experiments/semi_segment.py:laptop --data tissue --out RUN towers.labels.init=LABELS

Published: the repository gives no score. Not run here at full size. `laptop`: tissues of slices on 2 CPU cores, all of
which have masks; a table whose column `mask` is empty in places makes a corpus that lacks some.
"""

from ml_collections import ConfigDict

VNET = {'depths': (1, 3, 4, 4, 4), 'dims': (16, 32, 64, 128, 256), 'norm': 'batch', 'slope': 0.0}
VARIANTS = {
    'published': {
        'method': 'semi_segment',
        'model': 'nnunet_plain',
        'image_size': 144,
        'batch_size': 4,
        'steps': 8000,
        'learning_rate': 0.1,
        'eval_every': 400,
        'checkpoint_every': 400,
        'evaluators': 'loss,dice',
        'encoder': VNET,
        'objective': {'decoder': 'unet', 'decoder_options': {'depths': (1, 2, 3, 3)}, 'ce_weight': 0.5,
                      'dice_weight': 0.5, 'batch_dice': True, 'squared_dice': True, 'gamma': 1.0, 'consistency': 0.1,
                      'rampup': 1.0, 'ema': 0.99, 'noise': 0.1, 'code_noise': 0.01},
        'optimizer': {'name': 'sgd', 'b1': 0.9, 'weight_decay': 1e-4, 'warmup_steps': 0, 'final_learning_rate': 9.5e-3,
                      'clip': 0.0},
        'augment': {'scale': (1.0, 1.0), 'flip': (0.5,), 'brightness': 0.0, 'contrast': 0.0, 'gamma': 0.0, 'blur': 0.0},
        'loader': {'fit': 'crop', 'load_size': 144, 'normalize': 'percentile', 'balance': 'has_mask', 'alpha': 0.0},
    },
    'laptop': {
        'method': 'semi_segment',
        'model': 'nnunet_micro',
        'image_size': 48,
        'batch_size': 16,
        'steps': 300,
        'learning_rate': 1e-2,
        'eval_every': 100,
        'evaluators': 'loss,dice',
        'objective': {'decoder': 'unet'},
        'optimizer': {'name': 'sgd', 'b1': 0.9, 'weight_decay': 1e-4, 'warmup_steps': 15},
        'augment': {'blur': 0.0},
        'loader': {'balance': 'has_mask', 'alpha': 0.0},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
