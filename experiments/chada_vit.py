"""ChAda-ViT: DINO on one token a patch and channel, of images with 1 to 10 channels (arXiv 2311.15264).

Bourriez et al. 2024; nicoboou/chadavit, src/backbones/vit/chada_vit.py, src/methods/dino.py and the settings of its
released model (scripts/knn/bbbc048): width 192, 12 blocks of 2 heads with 2048 hidden units, patch 16, one shared
position a place and an embedding a channel, missing channels padded and masked; head 2048-256-4096, teacher temperature
0.04 to 0.07 in 50 epochs, momentum 0.9995 to 1, two views of 224 pixels without local ones, 400 epochs, batch 2 x 8.
Differs: its embeddings go by the place of a channel in an image, these by its name; its blocks normalise after each
branch, use ReLU and draw queries, keys and values by Xavier's law, and its last norm has an epsilon of 1e-6; its
optimizer is solo-learn's LARS (eta 0.02, clipped, decay 1e-6), which this one's is not: here AdamW at DINO's rate,
decay and batch of 256; views are the first two of its asymmetric file, without gray and hue, which these channels lack.

  jaxmed train experiments/chada_vit.py --data IDRCELL100K --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/chada_vit.py:laptop --data corpus --out RUN

Published: above one-channel and three-channel baselines on all of its benchmarks (figures alone in the repository).
Not run here at full size. `laptop`: the demo corpus on 2 CPU cores.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'dino',
        'model': 'channel_vit_tiny/16',
        'image_size': 224,
        'batch_size': 256,
        'epochs': 400.0,
        'learning_rate': 5e-4,
        'encoder': {'num_heads': 2, 'mlp_ratio': 2048 / 192, 'pos_interpolation': 'offset', 'drop_path': 0.0,
                    'norm_epsilon': 1e-5},
        'objective': {'out_dim': 4096, 'hidden_dim': 2048, 'bottleneck_dim': 256, 'norm_last_layer': True,
                      'student_temperature': 0.1, 'start_temperature': 0.04, 'teacher_temperature': 0.07,
                      'temperature_epochs': 50.0, 'freeze_epochs': 1.0, 'start_momentum': 0.9995,
                      'centre_momentum': 0.9},
        'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.04, 'final_weight_decay': 0.4, 'clip': 0.0,
                      'warmup_epochs': 10.0, 'final_learning_rate': 1e-6},
        'augment': {'views': 2, 'local_views': 0, 'scale': (0.08, 1.0), 'flip': (0.0, 0.5),
                    'jitter_probability': (0.8,), 'brightness': 0.8, 'contrast': 0.4, 'color': (), 'grayscale': (0.0,),
                    'blur': 2.0, 'blur_probability': (1.0, 0.1, 0.5), 'solarize': (0.0, 0.2, 0.0)},
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
        'augment': {'views': 2, 'local_views': 0, 'scale': (0.3, 1.0), 'jitter_probability': (0.8,), 'brightness': 0.2,
                    'contrast': 0.2, 'color': (), 'grayscale': (0.0,)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
