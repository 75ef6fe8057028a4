"""LVM-Med: graph matching of medical images, ResNet-50 and ViT-B/16 (Nguyen et al. 2023, arXiv 2306.11925).

The authors give their training code on request only, so this cannot be a reproduction: graphs, affinities and rate
(5e-4 * B / 256 at a batch of 800) are those of the public forerunner that objectives/contrastive/lvm_med.py names, the
100 epochs are from memory of the paper, the crops and colours those of BYOL. Differs: see that file, and what
experiments/README.md says of colours; graphs are of ten images.

  jaxmed train experiments/lvm_med.py --data IMAGES --out RUN
  jaxmed train experiments/lvm_med.py:vit --data IMAGES --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/lvm_med.py:laptop --data corpus --out RUN

Published, on 1.3 million images of 55 data sets: mean Dice of 2D segmentation 83.05 (ResNet-50) and 85.80 (ViT-B,
prompted with boxes), mean 3D IoU 79.02 and 80.90 (README.md). Not run here at full size. `laptop`: the demo corpus on 2
CPU cores, graphs of eight images.
"""

from ml_collections import ConfigDict

PUBLISHED = {
    'method': 'lvm_med',
    'model': 'resnet50',
    'image_size': 224,
    'batch_size': 800,
    'epochs': 100.0,
    'learning_rate': 5e-4 * 800 / 256,
    'encoder': {'zero_init_residual': True},
    'objective': {'group': 10, 'neighbors': 5, 'edge_weight': 0.5, 'local_weight': 0.25, 'matches': 20, 'noise': 0.05,
                  'strength': 80.0},
    'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.05, 'warmup_epochs': 10.0,
                  'final_learning_rate': 0.001 * 5e-4 * 800 / 256},
    'augment': {'views': 2, 'scale': (0.08, 1.0), 'flip': (0.0, 0.5), 'jitter_probability': (0.8,),
                'brightness': 0.8, 'contrast': 0.4, 'color': (0.2, 0.1), 'grayscale': (0.2,), 'blur': 2.0,
                'blur_probability': (1.0, 0.1, 0.1), 'solarize': (0.0, 0.2, 0.0)},
}

VARIANTS = {
    'published': PUBLISHED,
    'vit': PUBLISHED | {'model': 'vit_base/16', 'encoder': {}},
    'laptop': {
        'method': 'lvm_med',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 800,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'objective': {'group': 8, 'neighbors': 3, 'matches': 5, 'hidden_dim': 256, 'local_dim': 128},
        'augment': {'views': 2, 'scale': (0.3, 1.0),
                    'channel_sampling': 'hcs', 'jitter_probability': (0.8,), 'brightness': 0.2, 'contrast': 0.2,
                    'color': (0.1, 0.05), 'grayscale': (0.0,)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
