"""MAE: masked autoencoding of ViT-L/16 on ImageNet-1k, 800 epochs (He et al. 2022, arXiv 2111.06377).

Reproduces the pretraining command of facebookresearch/mae, PRETRAIN.md: batch 4096, rate 1.5e-4 * B / 256, warm-up of
40 epochs, norm-pixel loss, mask 0.75, decoder of 8 blocks. Differs: see experiments/README.md; nothing else.

  jaxmed train experiments/mae.py --data IMAGENET --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/mae.py:laptop --data corpus --out RUN

Published: 85.5 % top-1 on ImageNet-1k after fine-tuning; 42 hours on 64 V100 (PRETRAIN.md). Not run here at full size.
`laptop`: the demo corpus on 2 CPU cores; half of the tokens hidden (a channel has nine), missing channels predicted.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'mae',
        'model': 'vit_large/16',
        'image_size': 224,
        'batch_size': 4096,
        'epochs': 800.0,
        'learning_rate': 1.5e-4 * 4096 / 256,
        'objective': {'mask_ratio': 0.75, 'norm_pixels': True, 'decoder_dim': 512, 'decoder_depth': 8,
                      'decoder_heads': 16},
        'optimizer': {'b1': 0.9, 'b2': 0.95, 'weight_decay': 0.05, 'warmup_epochs': 40.0},
        'augment': {'scale': (0.2, 1.0), 'flip': (0.0, 0.5)},
    },
    'laptop': {
        'method': 'mae',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 800,
        'learning_rate': 1e-3,
        'eval_every': 200,
        'objective': {'mask_ratio': 0.5, 'unsampled': 'predict'},
        'augment': {'channel_sampling': 'hcs', 'scale': (0.6, 1.0)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
