"""ChannelViT against ViT where training records lack channels: a claim of Bao et al. 2024 (arXiv 2309.16108).

The recipes of fewer_channels.py, with hierarchical channel sampling, where three quarters of the training records have
the five fluorescence channels of JUMP-CP alone (loader.missing). They are judged on all channels. `published` is
ChannelViT-S, `published_vit` ViT-S; for another share set loader.missing. Differs: what experiments/supervised.py
differs in; there 25, 50 and 75 % of the records have all channels (from memory, not checked).

  jaxmed prepare JUMPCP --layout jumpcp --out CORPUS
  jaxmed train experiments/channel_vit/missing_channels.py --data CORPUS --out RUN
  jaxmed train experiments/channel_vit/missing_channels.py:published_vit --data CORPUS --out RUN_VIT
  jaxmed evaluate RUN --beside RUN_VIT --data CORPUS --label label --channels all --out channels.json

All three claims with seeds and intervals, here (`:laptop`) and at full size:

  python tools/channel_claims.py --data CORPUS --label label --size published --out CLAIMS
  python tools/channel_claims.py --data DEMO --label region --out CLAIMS

Published: ChannelViT is ahead of ViT at every share; the numbers are not at hand. 8 GPUs. Not run here at full size.
`laptop` and `laptop_vit`: see all_channels.py; there three quarters of the demo corpus lack WM.
"""

from ml_collections import ConfigDict

PUBLISHED = {
    'method': 'supervised',
    'model': 'channel_vit_small/16',
    'image_size': 224,
    'batch_size': 256,
    'epochs': 100.0,
    'learning_rate': 5e-4,
    'encoder': {'drop_path': 0.1},
    'objective': {'label_smoothing': 0.0},
    'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.04, 'final_weight_decay': 0.4, 'warmup_epochs': 10.0,
                  'final_learning_rate': 1e-6},
    'augment': {'channel_sampling': 'hcs', 'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'flip': (0.5, 0.5),
                'rotate90': (0.5,), 'blur': 1.0, 'blur_probability': (0.5,)},
    'loader': {'label': 'label', 'load_size': (224, 224), 'fit': 'crop',
               'missing': 'brightfield high,brightfield low,brightfield=0.75'},
}
LAPTOP = {
    'method': 'supervised',
    'model': 'channel_vit_micro/16',
    'image_size': 48,
    'batch_size': 32,
    'steps': 900,
    'learning_rate': 1e-3,
    'eval_every': 900,
    'encoder': {'drop_path': 0.0, 'depth': 2},
    'objective': {'label_smoothing': 0.0},
    'augment': {'channel_sampling': 'hcs', 'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'flip': (0.0, 0.0),
                'brightness': 0.1, 'contrast': 0.1},
    'loader': {'label': 'region', 'missing': 'WM=0.75'},
}
VARIANTS = {
    'published': PUBLISHED,
    'published_vit': PUBLISHED | {'model': 'vit_small/16',
                                 'encoder': PUBLISHED['encoder'] | {'patch_init': 'torch'}},
    'laptop': LAPTOP,
    'laptop_vit': LAPTOP | {'model': 'vit_micro/16'},
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
