"""ChannelViT against ViT with all channels: the first claim of Bao et al. 2024 (arXiv 2309.16108), one of three.

Supervised, as in insitro/ChannelViT (README.md; channelvit/config: main_supervised.yaml, meta_arch/supervised.yaml), on
JUMP-CP with 8 channels and 161 classes at patch 16, every view with all channels: `published` is ChannelViT-S,
`published_vit` ViT-S. What hierarchical channel sampling adds is the matter of fewer_channels.py, whose `published` and
`published_vit` are the same two with it. Differs: what experiments/supervised.py differs in.

  jaxmed prepare JUMPCP --layout jumpcp --out CORPUS
  jaxmed train experiments/channel_vit/all_channels.py --data CORPUS --out RUN
  jaxmed train experiments/channel_vit/all_channels.py:published_vit --data CORPUS --out RUN_VIT
  jaxmed evaluate RUN --beside RUN_VIT --data CORPUS --label label --channels all --out channels.json

All three claims with seeds and intervals, here (`:laptop`) and at full size:

  python tools/channel_claims.py --data CORPUS --label label --size published --out CLAIMS
  jaxmed prepare synthetic --out SYNTHETIC
  python tools/channel_claims.py --data SYNTHETIC --label relation --out CLAIMS

Published, on all 8 channels, from memory of table 2 and not checked: ChannelViT-S/16 ahead of ViT-S/16, with sampling
68.09 against 56.87 %. 8 GPUs. Not run here at full size. `laptop` and `laptop_vit`: a smaller model on 2 CPU cores, for
the demo corpus and the synthetic one, whose classes need two channels (it was shaped until a ChannelViT of this size
learns it, so it is no neutral test of this claim); neither crops nor flips, which a torus and regions of a brain do
not take.
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
    'augment': {'channel_sampling': 'none', 'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'flip': (0.5, 0.5),
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
    'augment': {'channel_sampling': 'none', 'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'flip': (0.0, 0.0),
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
