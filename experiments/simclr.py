"""SimCLR: ResNet-50 on ImageNet-1k, 100 epochs (Chen et al. 2020, arXiv 2002.05709).

Reproduces the ImageNet command of google-research/simclr, README.md: batch 4096, LARS at 0.075 * sqrt(B) (which is 0.3
* B / 256 at this batch), decay 1e-4, warm-up of 10 epochs, temperature 0.1, a projector of three layers, the sum of
both views' losses. Differs: the last norm of the projector has no scale, its kernels begin by PyTorch's rule (there
normal, 0.01), and what experiments/README.md says of colours.

  jaxmed train experiments/simclr.py --data IMAGENET --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/simclr.py:laptop --data corpus --out RUN

Published: 64.5 % top-1 on ImageNet-1k, linear; about 6 hours on 32 TPU v3 (README.md). Not run here at full size.
`laptop`: the demo corpus on 2 CPU cores, temperature 0.5.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'simclr',
        'model': 'resnet50',
        'image_size': 224,
        'batch_size': 4096,
        'epochs': 100.0,
        'learning_rate': 0.3 * 4096 / 256,
        'encoder': {'zero_init_residual': True},
        'objective': {'temperature': 0.1, 'layers': 3, 'hidden_dim': 2048, 'out_dim': 128, 'sum_views': True},
        'optimizer': {'name': 'lars', 'b1': 0.9, 'weight_decay': 1e-4, 'warmup_epochs': 10.0},
        'augment': {'views': 2, 'scale': (0.08, 1.0), 'flip': (0.0, 0.5), 'jitter_probability': (0.8,),
                    'brightness': 1.6, 'contrast': 0.8, 'color': (0.8, 0.2), 'grayscale': (0.2,), 'blur': 2.0,
                    'blur_probability': (0.5,)},
    },
    'laptop': {
        'method': 'simclr',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 800,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'objective': {'temperature': 0.5, 'hidden_dim': 512},
        'augment': {'views': 2, 'scale': (0.3, 1.0),
                    'channel_sampling': 'hcs', 'jitter_probability': (0.8,), 'brightness': 0.2, 'contrast': 0.2,
                    'color': (0.1, 0.05), 'grayscale': (0.0,)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
