"""SurgeNet: DINO on frames of surgery with CAFormer, ConvNeXt V2 and PVT v2 (Jaspers et al. 2024, arXiv 2407.17904).

Reproduces the models of TimJaspers0801/SurgeNet, README.md (50 epochs each): `published` CAFormer-S18, `convnextv2`
ConvNeXt V2-Tiny, `pvt` PVT v2-B2. That repository holds no training options; these are the authors' later ones for DINO
(rlpddejong/SurgeNetDINO, dinov1_configs/config_dinov1_vitb.sh): batch 4 * 136, rate 5e-4 * B / 256, warm-up of 10
epochs, teacher temperature 0.04 throughout, 65536 prototypes of length 1. Differs: what experiments/README.md says of
colours; the paper starts from ImageNet weights (from memory): give init=FILE, a file of `jaxmed import`.

  jaxmed train experiments/surgenet.py --data FRAMES --out RUN init=FILE
  jaxmed train experiments/surgenet.py:convnextv2 --data FRAMES --out RUN init=FILE
  jaxmed prepare demo --out corpus && jaxmed train experiments/surgenet.py:laptop --data corpus --out RUN

Published: on 4.7 million frames (SurgeNetXL) 14.4 % better segmentation, 4.0 % phase recognition and 1.6 % critical
view of safety than the best of ImageNet (README.md). Not run here at full size. `laptop`: the demo corpus on 2 CPU
cores, a small CAFormer, all channels.
"""

from ml_collections import ConfigDict

PUBLISHED = {
    'method': 'dino',
    'model': 'caformer_s18',
    'image_size': 224,
    'batch_size': 4 * 136,
    'epochs': 50.0,
    'learning_rate': 5e-4 * 4 * 136 / 256,
    'encoder': {'drop_path': 0.1},
    'objective': {'out_dim': 65536, 'hidden_dim': 2048, 'bottleneck_dim': 256, 'norm_last_layer': True,
                  'start_temperature': 0.04, 'teacher_temperature': 0.04, 'temperature_epochs': 0.0,
                  'freeze_epochs': 1.0, 'start_momentum': 0.996},
    'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.04, 'final_weight_decay': 0.4, 'warmup_epochs': 10.0,
                  'clip': 3.0, 'clip_scope': 'tensor', 'final_learning_rate': 1e-6},
    'augment': {'views': 2, 'local_views': 8, 'local_size': 96, 'scale': (0.4, 1.0), 'local_scale': (0.05, 0.4),
                'flip': (0.0, 0.5), 'jitter_probability': (0.8,), 'brightness': 0.8, 'contrast': 0.4,
                'color': (0.2, 0.1), 'grayscale': (0.2,), 'blur': 2.0, 'blur_probability': (1.0, 0.1, 0.5),
                'solarize': (0.0, 0.2, 0.0)},
}

VARIANTS = {
    'published': PUBLISHED,
    'convnextv2': PUBLISHED | {'model': 'convnextv2_tiny'},
    'pvt': PUBLISHED | {'model': 'pvt_v2_b2'},
    'laptop': {
        'method': 'dino',
        'model': 'caformer_micro',
        'image_size': 48,
        'batch_size': 32,
        'steps': 600,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'encoder': {'drop_path': 0.0},
        'objective': {'out_dim': 1024, 'hidden_dim': 512, 'bottleneck_dim': 128, 'start_momentum': 0.99},
        'optimizer': {'final_weight_decay': 0.1},
        'augment': {'views': 2, 'local_views': 4, 'local_size': 32, 'scale': (0.4, 1.0), 'local_scale': (0.1, 0.4),
                    'jitter_probability': (0.8,), 'brightness': 0.2, 'contrast': 0.2,
                    'color': (0.1, 0.05), 'grayscale': (0.0,)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
