"""Hierarchical channel sampling against none, with fewer test channels: a claim of Bao et al. 2024 (arXiv 2309.16108).

The recipes of all_channels.py with hierarchical channel sampling: for each batch a number n of channels, uniform in
1 .. C, then n of them. ChannelViT (`published`) loses the tokens of the others; ViT (`published_vit`) sees them zeroed
and the rest scaled by C / n. Without sampling: the variants of all_channels.py. Differs: what experiments/supervised.py
differs in.

  jaxmed prepare JUMPCP --layout jumpcp --out CORPUS
  jaxmed train experiments/channel_vit/fewer_channels.py --data CORPUS --out RUN
  jaxmed train experiments/channel_vit/all_channels.py --data CORPUS --out RUN_ALL
  jaxmed evaluate RUN --beside RUN_ALL --data CORPUS --label label --channels all --out channels.json

All three claims with seeds and intervals, here (`:laptop`) and at full size:

  python tools/channel_claims.py --data CORPUS --label label --size published --out CLAIMS
  python tools/channel_claims.py --data DEMO --label region --out CLAIMS

Published: with sampling the accuracy falls little with the number of test channels, without it to chance; the table's
numbers by channels are not at hand. 8 GPUs. Not run here at full size. `laptop` and `laptop_vit`: see all_channels.py.
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
    'loader': {'label': 'label', 'load_size': (224, 224), 'fit': 'crop'},
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
    'loader': {'label': 'region'},
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
