"""Swin UNETR's pretraining: rotation, contrast and inpainting of CT crops (Tang et al. 2022, arXiv 2111.14791).

Reproduces the command of Project-MONAI/research-contributions, SwinUNETR/Pretrain/README.md (main.py, utils/ops.py):
crops of 96^3 voxels, 100,000 steps of 16 crops (8 devices, one volume each, two crops of it), AdamW at 6e-6 with decay
0.1, a warm-up of 500 steps and a cosine, weights 1, 1 and 1. Differs: see the method's docstring, of which
objective.axis=x and objective.corner_tokens=True undo two; the 16 crops are of as many volumes; volumes are not cropped
to what is brighter than air; the window is -1 to 1, there 0 to 1, so that the restoration counts twice. The stage that
adds masks is fine-tuning: `jaxmed finetune RUN --task segment`, with the decoder swin_unetr.

  jaxmed prepare SCANS --out ct --volumes whole
  jaxmed train experiments/swin_unetr_ssl.py --data ct --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/swin_unetr_ssl.py:laptop --data corpus --out RUN

Published: the first place of the BTCV and MSD challenges at the time, after fine-tuning (abstract). Not run here at
full size. `laptop`: the demo corpus on 2 CPU cores.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'swin_unetr_ssl',
        'model': 'swin_unetr_48',
        'image_size': 96,
        'batch_size': 16,
        'steps': 100_000,
        'learning_rate': 6e-6,
        'optimizer': {'weight_decay': 0.1, 'warmup_steps': 500},
        'augment': {'scale': (1.0, 1.0)},
        'loader': {'fit': 'crop', 'load_size': 96, 'normalize': 'window:-1000:1000'},
    },
    'laptop': {
        'method': 'swin_unetr_ssl',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 400,
        'learning_rate': 1e-3,
        'eval_every': 200,
        'objective': {'out_dim': 128},
        'augment': {'channel_sampling': 'hcs'},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
