"""DINO: ViT-S/16 on ImageNet-1k, 300 epochs, boosted (Caron et al. 2021, arXiv 2104.14294).

Reproduces the command under "Boosting DINO performance" of facebookresearch/dino, README.md, with the defaults of
main_dino.py: batch 1024, rate 5e-4 * B / 256, warm-up of 10 epochs, decay 0.04 to 0.4, teacher temperature 0.04 to 0.07
in 30 epochs, prototypes of free length, clip 3 tensor by tensor. Differs: temperatures rise with every step (there once
an epoch), and what experiments/README.md says of colours.

  jaxmed train experiments/dino.py --data IMAGENET --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/dino.py:laptop --data corpus --out RUN

Published: 73.3 % kNN and 76.0 % linear top-1 on ImageNet-1k; 2.6 days on 16 GPUs (README.md). Not run here at full
size. `laptop`: the demo corpus on 2 CPU cores, 4 local views of 32 pixels, 1024 prototypes, momentum from 0.99.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'dino',
        'model': 'vit_small/16',
        'image_size': 224,
        'batch_size': 1024,
        'epochs': 300.0,
        'learning_rate': 5e-4 * 1024 / 256,
        'encoder': {'drop_path': 0.1, 'pos_interpolation': 'offset'},
        'objective': {'out_dim': 65536, 'hidden_dim': 2048, 'bottleneck_dim': 256, 'norm_last_layer': False,
                      'student_temperature': 0.1, 'start_temperature': 0.04, 'teacher_temperature': 0.07,
                      'temperature_epochs': 30.0, 'freeze_epochs': 1.0, 'start_momentum': 0.996,
                      'centre_momentum': 0.9},
        'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.04, 'final_weight_decay': 0.4, 'warmup_epochs': 10.0,
                      'clip': 3.0, 'clip_scope': 'tensor', 'final_learning_rate': 1e-6},
        'augment': {'views': 2, 'local_views': 8, 'local_size': 96, 'scale': (0.4, 1.0), 'local_scale': (0.05, 0.4),
                    'flip': (0.0, 0.5), 'jitter_probability': (0.8,), 'brightness': 0.8, 'contrast': 0.4,
                    'color': (0.2, 0.1), 'grayscale': (0.2,), 'blur': 2.0, 'blur_probability': (1.0, 0.1, 0.5),
                    'solarize': (0.0, 0.2, 0.0)},
    },
    'laptop': {
        'method': 'dino',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 600,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'encoder': {'drop_path': 0.0},
        'objective': {'out_dim': 1024, 'hidden_dim': 512, 'bottleneck_dim': 128, 'start_momentum': 0.99},
        'optimizer': {'final_weight_decay': 0.1},
        'augment': {'views': 2, 'local_views': 4, 'local_size': 32, 'scale': (0.4, 1.0), 'local_scale': (0.1, 0.4),
                    'channel_sampling': 'hcs', 'jitter_probability': (0.8,), 'brightness': 0.2, 'contrast': 0.2,
                    'color': (0.1, 0.05), 'grayscale': (0.0,)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
