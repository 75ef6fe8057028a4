"""MoCo v3: ViT-B/16 and ResNet-50 on ImageNet-1k, 300 epochs (Chen, Xie, He 2021, arXiv 2104.02057).

Reproduces the commands of facebookresearch/moco-v3, CONFIG.md: batch 4096, momentum 0.99 to 1; `published` is ViT-B
with AdamW at 1.5e-4 * B / 256, decay 0.1, warm-up of 40 epochs, temperature 0.2 and a frozen patch projection;
`resnet50` has LARS at 0.3 * B / 256, decay 1e-6, warm-up of 10 epochs, temperature 1 and crops from 0.2. Differs: what
experiments/README.md says of colours.

  jaxmed train experiments/mocov3.py --data IMAGENET --out RUN
  jaxmed train experiments/mocov3.py:resnet50 --data IMAGENET --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/mocov3.py:laptop --data corpus --out RUN

Published: ViT-B 76.7 % top-1 on ImageNet-1k, linear, and 83.2 % fine-tuned; ResNet-50 72.8 % linear (README.md); ViT-B
on 8 nodes of 8 GPUs, ResNet-50 on 16 V100-32GB. Not run here at full size. `laptop`: the demo corpus on 2 CPU cores,
heads 512 wide.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'mocov3',
        'model': 'vit_base/16',
        'image_size': 224,
        'batch_size': 4096,
        'epochs': 300.0,
        'learning_rate': 1.5e-4 * 4096 / 256,
        'objective': {'temperature': 0.2, 'momentum_start': 0.99, 'freeze_patch_embed': True, 'projector_layers': 3,
                      'predictor_layers': 2, 'predictor_norm': True, 'hidden_dim': 4096, 'out_dim': 256},
        'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.1, 'warmup_epochs': 40.0},
        'augment': {'views': 2, 'scale': (0.08, 1.0), 'flip': (0.0, 0.5), 'jitter_probability': (0.8,),
                    'brightness': 0.8, 'contrast': 0.4, 'color': (0.2, 0.1), 'grayscale': (0.2,), 'blur': 2.0,
                    'blur_probability': (1.0, 0.1, 0.1), 'solarize': (0.0, 0.2, 0.0)},
    },
    'resnet50': {
        'method': 'mocov3',
        'model': 'resnet50',
        'image_size': 224,
        'batch_size': 4096,
        'epochs': 300.0,
        'learning_rate': 0.3 * 4096 / 256,
        'encoder': {'zero_init_residual': True},
        'objective': {'encoder_norm': 'apart', 'temperature': 1.0, 'momentum_start': 0.99, 'projector_layers': 2,
                      'predictor_layers': 2, 'predictor_norm': False, 'hidden_dim': 4096, 'out_dim': 256},
        'optimizer': {'name': 'lars', 'b1': 0.9, 'weight_decay': 1e-6, 'warmup_epochs': 10.0},
        'augment': {'views': 2, 'scale': (0.2, 1.0), 'flip': (0.0, 0.5), 'jitter_probability': (0.8,),
                    'brightness': 0.8, 'contrast': 0.4, 'color': (0.2, 0.1), 'grayscale': (0.2,), 'blur': 2.0,
                    'blur_probability': (1.0, 0.1, 0.1), 'solarize': (0.0, 0.2, 0.0)},
    },
    'laptop': {
        'method': 'mocov3',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 800,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'objective': {'hidden_dim': 512, 'out_dim': 128},
        'augment': {'views': 2, 'scale': (0.3, 1.0),
                    'channel_sampling': 'hcs', 'jitter_probability': (0.8,), 'brightness': 0.2, 'contrast': 0.2,
                    'color': (0.1, 0.05), 'grayscale': (0.0,)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
