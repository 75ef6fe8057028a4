"""VoCo: a Swin UNETR encoder on CT volumes, by where crops lie (Wu et al. 2024, arXiv 2402.17300 and 2410.09890).

Reproduces the second release (Luffy03/Large-Scale-Medical, Self-supervised/: dist_B.sh, voco_train.py,
models/voco_head.py): windows of 192 x 192 x 64 voxels cut into 3 x 3 bases of 64^3, 2 sliding crops, 2,000,000 steps of
16 volumes, AdamW at 1e-4 with a warm-up of 5,000 steps. `large` and `huge` have its wider encoders, `first` is the
first release (Luffy03/VoCo: whole volumes as 384 x 384 x 96, 4 x 4 bases of 96^3 as 64^3). Differs: see the method's
docstring; AdamW without the running maximum of amsgrad; one window of intensities, there another for chests (-1000 to
500 HU); volumes are prepared at one spacing (there chests 1.25 x 1.25 x 5 mm) and not cropped to what is brighter than
air. The stage that adds masks is fine-tuning: `jaxmed finetune RUN --task segment`.

  jaxmed prepare SCANS --out ct --volumes whole --spacing 1.5
  jaxmed train experiments/voco.py --data ct --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/voco.py:laptop --data corpus --out RUN

Published: 83.85 % mean Dice on BTCV after fine-tuning (first release, its README). Not run here at full size. `laptop`:
the demo corpus on 2 CPU cores, 2 x 2 bases of slices.
"""

from ml_collections import ConfigDict

AUGMENT = {'tiles': (3,), 'views': 11, 'scale': (1.0, 1.0), 'flip': (0.2,), 'rotate90': (0.2,), 'brightness': 0.2,
           'jitter_probability': (0.5,)}  # a shift of 0.1 of a window that is 0 .. 1 there and -1 .. 1 here
PUBLISHED = {
    'method': 'voco',
    'model': 'swin_unetr_48',
    'image_size': 64,
    'batch_size': 16,
    'steps': 2_000_000,
    'learning_rate': 1e-4,
    'encoder': {'use_v2': True},
    'objective': {'hidden_dim': 1024, 'out_dim': 1024, 'dropout_of': 'samples'},
    'optimizer': {'weight_decay': 0.01, 'warmup_steps': 5000},
    'augment': AUGMENT,
    'loader': {'normalize': 'window:-175:250'},
}

VARIANTS = {
    'published': PUBLISHED,
    'large': PUBLISHED | {'model': 'swin_unetr_96'},
    'huge': PUBLISHED | {'model': 'swin_unetr_192'},
    'first': PUBLISHED | {
        'batch_size': 2,
        'steps': 250_000,
        'objective': {'teacher': 'whole', 'both_ways': True, 'negative': 'square', 'inter_weight': 0.0, 'dropout': 0.0,
                      'hidden_dim': 2048, 'out_dim': 2048},
        'augment': AUGMENT | {'tiles': (4,), 'views': 18, 'jitter_probability': (0.1,)},
        'loader': {'normalize': 'window:-175:250', 'fit': 'resize', 'load_size': 384},
    },
    'laptop': {
        'method': 'voco',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 400,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'objective': {'hidden_dim': 256, 'out_dim': 128},
        'augment': {'tiles': (2,), 'views': 6, 'channel_sampling': 'hcs'},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
