"""VICReg: ResNet-50 on ImageNet-1k, 1000 epochs (Bardes, Ponce, LeCun 2022, arXiv 2105.04906).

Reproduces the command for 4 nodes of facebookresearch/vicreg, README.md: batch 2048, LARS at 0.2 * B / 256 with decay
1e-6, warm-up of 10 epochs, then a cosine to a thousandth, weights 25, 25 and 1, an expander of 8192-8192-8192. Differs:
what experiments/README.md says of colours.

  jaxmed train experiments/vicreg.py --data IMAGENET --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/vicreg.py:laptop --data corpus --out RUN

Published: 73.2 % top-1 on ImageNet-1k, linear; 32 GPUs (README.md). Not run here at full size. `laptop`: the demo
corpus on 2 CPU cores, an expander 512 wide.
"""

from ml_collections import ConfigDict

RATE = 0.2 * 2048 / 256

VARIANTS = {
    'published': {
        'method': 'vicreg',
        'model': 'resnet50',
        'image_size': 224,
        'batch_size': 2048,
        'epochs': 1000.0,
        'learning_rate': RATE,
        'encoder': {'zero_init_residual': True},
        'objective': {'encoder_norm': 'apart', 'invariance': 25.0, 'variance': 25.0, 'covariance': 1.0,
                      'hidden_dim': 8192},
        'optimizer': {'name': 'lars', 'b1': 0.9, 'weight_decay': 1e-6, 'warmup_epochs': 10.0,
                      'final_learning_rate': 0.001 * RATE},
        'augment': {'views': 2, 'scale': (0.08, 1.0), 'flip': (0.0, 0.5), 'jitter_probability': (0.8,),
                    'brightness': 0.8, 'contrast': 0.4, 'color': (0.2, 0.1), 'grayscale': (0.2,), 'blur': 2.0,
                    'blur_probability': (1.0, 0.1, 0.1), 'solarize': (0.0, 0.2, 0.0)},
    },
    'laptop': {
        'method': 'vicreg',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 800,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'objective': {'hidden_dim': 512},
        'augment': {'views': 2, 'scale': (0.3, 1.0),
                    'channel_sampling': 'hcs', 'jitter_probability': (0.8,), 'brightness': 0.2, 'contrast': 0.2,
                    'color': (0.1, 0.05), 'grayscale': (0.0,)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
