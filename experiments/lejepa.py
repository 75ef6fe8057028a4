"""LeJEPA: ViT-L/14 on ImageNet-1k, 100 epochs (Balestriero, LeCun 2025, arXiv 2511.08544).

Reproduces the hyperparameters of rbalestr-lab/lejepa, README.md: AdamW at 5e-4 with decay 0.05, linear warm-up and a
cosine to a thousandth, 2 x 224 (0.3, 1) and 6 x 98 (0.05, 0.3) crops, all with the same changes of colour, bfloat16.
That file names no batch, length of the warm-up or patch size: 512, 10 epochs and 14 (which divides 98) are chosen here.
Differs: what experiments/README.md says of colours.

  jaxmed train experiments/lejepa.py --data IMAGENET --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/lejepa.py:laptop --data corpus --out RUN

Published, after 100 epochs: 79.48 % top-1 as the mean of eight data sets with all labels, linear (README.md). Not run
here at full size. `laptop`: the demo corpus on 2 CPU cores, 256 slices.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'lejepa',
        'model': 'vit_large/14',
        'image_size': 224,
        'batch_size': 512,
        'epochs': 100.0,
        'learning_rate': 5e-4,
        'encoder': {'drop_path': 0.1, 'patch_init': 'torch', 'token_std': 1e-6, 'dtype': 'bfloat16'},
        'objective': {'sigreg_weight': 0.05, 'slices': 1024, 'knots': 17, 'hidden_dim': 2048, 'out_dim': 128},
        'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.05, 'warmup_epochs': 10.0,
                      'final_learning_rate': 5e-7},
        'augment': {'views': 2, 'local_views': 6, 'local_size': 98, 'scale': (0.3, 1.0), 'local_scale': (0.05, 0.3),
                    'flip': (0.0, 0.5), 'jitter_probability': (0.8,), 'brightness': 0.8, 'contrast': 0.4,
                    'color': (0.2, 0.1), 'grayscale': (0.2,), 'blur': 2.0, 'blur_probability': (0.5,),
                    'solarize': (0.2,)},
    },
    'laptop': {
        'method': 'lejepa',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 600,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'objective': {'slices': 256, 'hidden_dim': 512, 'out_dim': 32},
        'augment': {'views': 2, 'local_views': 4, 'local_size': 32, 'scale': (0.4, 1.0), 'local_scale': (0.1, 0.4),
                    'channel_sampling': 'hcs', 'jitter_probability': (0.8,), 'brightness': 0.2, 'contrast': 0.2,
                    'color': (0.1, 0.05), 'grayscale': (0.0,)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
