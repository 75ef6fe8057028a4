"""DiChaViT-S: ChannelViT with diverse channels (Pham and Plummer 2024, arXiv 2405.16419).

Reproduces chaudatascience/diverse_channel_vit, train_scripts.sh: diverse channel sampling, channel and token diversity
losses, orthogonal channel embeddings; 100 epochs, rate 4e-4. `published` is JUMP-CP (8 channels) at patch 16, batch 64,
10 epochs of warm-up, decay 0.04; `so2sat` So2Sat (18 channels) at patch 8, batch 128, with the warm-up of 3 epochs of
configs/scheduler/cosine.yaml and the decay 5e-5 of configs/optimizer/adamw.yaml. Differs: views of JUMP-CP are those of
experiments/supervised.py; the cosine begins after the warm-up (there with it, which leaves 0.976 of the rate at its end
on JUMP-CP). CHAMMI, which there fine-tunes DINOv2's weights, is left out.

  jaxmed train experiments/dichavit.py --data JUMPCP --out RUN
  jaxmed train experiments/dichavit.py:so2sat --data SO2SAT --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/dichavit.py:laptop --data corpus --out RUN

Published, from memory of the paper's table and not checked: 69.19 % on all channels of JUMP-CP (ChannelViT 67.51),
63.36 % on So2Sat (61.03). 2 GPUs. Not run here at full size. `laptop`: regions of the demo corpus on 2 CPU cores.
"""

from ml_collections import ConfigDict

JUMPCP = {
    'method': 'supervised',
    'model': 'channel_vit_small/16',
    'image_size': 224,
    'batch_size': 64,
    'epochs': 100.0,
    'learning_rate': 4e-4,
    'encoder': {'drop_path': 0.0, 'channel_init': 'orthogonal'},
    'objective': {'label_smoothing': 0.0, 'channel_diversity': 0.001, 'token_diversity': 0.001, 'same_channel': 1.0,
                  'other_channels': 4.0, 'diversity_temperature': 0.07},
    'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.04, 'warmup_epochs': 10.0},
    'augment': {'channel_sampling': 'diverse', 'channel_temperature': 1000.0, 'scale': (1.0, 1.0), 'ratio': (1.0, 1.0),
                'flip': (0.5, 0.5), 'rotate90': (0.5,), 'blur': 1.0, 'blur_probability': (0.5,)},
    'loader': {'label': 'label', 'load_size': (224, 224), 'fit': 'crop'},
}

VARIANTS = {
    'published': JUMPCP,
    'so2sat': JUMPCP | {
        'model': 'channel_vit_small/8',
        'image_size': 32,
        'batch_size': 128,
        'objective': JUMPCP['objective'] | {'token_diversity': 0.1, 'same_channel': 0.5},
        'optimizer': JUMPCP['optimizer'] | {'weight_decay': 5e-5, 'warmup_epochs': 3.0},
        'augment': {'channel_sampling': 'diverse', 'channel_temperature': 0.01, 'scale': (1.0, 1.0),
                    'ratio': (1.0, 1.0), 'flip': (0.5, 0.5), 'rotate90': (0.75,)},
        'loader': {'label': 'label'},
    },
    'laptop': {
        'method': 'supervised',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 800,
        'learning_rate': 1e-3,
        'eval_every': 200,
        'encoder': {'drop_path': 0.0, 'channel_init': 'orthogonal'},
        'objective': {'channel_diversity': 0.001, 'token_diversity': 0.001},
        'augment': {'channel_sampling': 'diverse', 'channel_temperature': 1.0, 'scale': (0.8, 1.0), 'flip': (0.0, 0.0),
                    'brightness': 0.1, 'contrast': 0.1},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
