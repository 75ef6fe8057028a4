"""I-JEPA: latents of target blocks with ViT-H/14 on ImageNet-1k, 300 epochs (Assran et al. 2023, arXiv 2301.08243).

Reproduces facebookresearch/ijepa, configs/in1k_vith14_ep300.yaml: batch 2048, rate 1e-3, warm-up of 40 epochs, decay
0.04 to 0.4, EMA 0.996 to 1, predictor of 12 blocks 384 wide, crops without flips or colours; contexts cut to the
shortest of 128 samples, and blocks that never touch the last row or column, as src/masks/multiblock.py has them.
Differs: the warm-up starts at 0 (there 2e-4); a context of 10 tokens or fewer is not drawn again.

  jaxmed train experiments/ijepa.py --data IMAGENET --out RUN mesh.fsdp=8
  jaxmed prepare demo --out corpus && jaxmed train experiments/ijepa.py:laptop --data corpus --out RUN

Published: 79.3 % top-1 on ImageNet-1k, linear (paper, table 1, from memory); 16 A100-80GB (README.md). Not run here at
full size. `laptop`: the demo corpus on 2 CPU cores; two target blocks of two or three of the nine places.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'ijepa',
        'model': 'vit_huge/14',
        'image_size': 224,
        'batch_size': 2048,
        'epochs': 300.0,
        'learning_rate': 1e-3,
        'encoder': {'dtype': 'bfloat16', 'remat': 'full'},
        'objective': {'num_targets': 4, 'target_scale': (0.15, 0.2), 'target_aspect': (0.75, 1.5),
                      'context_scale': (0.85, 1.0), 'blocks': 'published', 'context_group': 128,
                      'momentum_start': 0.996, 'momentum_end': 1.0,
                      'predictor_dim': 384, 'predictor_depth': 12, 'predictor_heads': 16},
        'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.04, 'final_weight_decay': 0.4, 'warmup_epochs': 40.0,
                      'final_learning_rate': 1e-6},
        'augment': {'scale': (0.3, 1.0), 'flip': (0.0, 0.0)},
    },
    'laptop': {
        'method': 'ijepa',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 800,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'objective': {'num_targets': 2, 'target_scale': (0.2, 0.35), 'predictor_dim': 64, 'predictor_depth': 2,
                      'momentum_start': 0.99},
        'optimizer': {'final_weight_decay': 0.1},
        'augment': {'channel_sampling': 'hcs', 'scale': (0.6, 1.0)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
