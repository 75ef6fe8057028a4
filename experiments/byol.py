"""BYOL: ResNet-50 on ImageNet-1k, 1000 epochs (Grill et al. 2020, arXiv 2006.07733).

Reproduces google-deepmind/deepmind-research, byol/configs/byol.py, with the README's batch of 4096: LARS at 0.2 * B /
256 with decay 1.5e-6, warm-up of 10 epochs, target momentum 0.996 to 1, heads 4096 wide to 256. Differs: the target
starts as a copy, and what experiments/README.md says of colours. Their brightness adds up to 0.4 to images in 0 .. 1,
which are 1.77 deviations.

  jaxmed train experiments/byol.py --data IMAGENET --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/byol.py:laptop --data corpus --out RUN

Published: 74.0 to 74.5 % top-1 on ImageNet-1k, linear; about 8 hours on 512 TPU v3 (byol/README.md). Not run here at
full size. `laptop`: the demo corpus on 2 CPU cores, heads 512 wide, momentum from 0.99.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'byol',
        'model': 'resnet50',
        'image_size': 224,
        'batch_size': 4096,
        'epochs': 1000.0,
        'learning_rate': 0.2 * 4096 / 256,
        'encoder': {'zero_init_residual': True},
        'objective': {'momentum_start': 0.996, 'hidden_dim': 4096, 'out_dim': 256, 'encoder_norm': 'apart'},
        'optimizer': {'name': 'lars', 'b1': 0.9, 'weight_decay': 1.5e-6, 'warmup_epochs': 10.0},
        'augment': {'views': 2, 'scale': (0.08, 1.0), 'flip': (0.0, 0.5), 'jitter_probability': (0.8,),
                    'brightness': 1.77, 'contrast': 0.4, 'color': (0.2, 0.1), 'grayscale': (0.2,), 'blur': 2.0,
                    'blur_probability': (1.0, 0.1, 0.1), 'solarize': (0.0, 0.2, 0.0)},
    },
    'laptop': {
        'method': 'byol',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 800,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'objective': {'momentum_start': 0.99, 'hidden_dim': 512, 'out_dim': 128},
        'augment': {'views': 2, 'scale': (0.3, 1.0),
                    'channel_sampling': 'hcs', 'jitter_probability': (0.8,), 'brightness': 0.2, 'contrast': 0.2,
                    'color': (0.1, 0.05), 'grayscale': (0.0,)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
