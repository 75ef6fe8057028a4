"""SimMIM: masked pixels of ViT-B/16 on ImageNet-1k, 800 epochs (Xie et al. 2022, arXiv 2111.09886).

Reproduces microsoft/SimMIM, configs/vit_base__800ep/simmim_pretrain__vit_base__img224__800ep.yaml: batch 2048, rate
1e-4 * B / 512, warm-up of 10 epochs, squares of 32 pixels, 0.6 of them hidden, mean absolute error, LayerScale 0.1
(config.py), weights cut off at one deviation and ends of branches over sqrt(2 * layer). Differs: learned positions
(there relative biases, shared by all blocks, and no position table), keys have a bias, and a cosine to the rate that
the published steps end with (there a tenth from epoch 700 on).

  jaxmed train experiments/simmim.py --data IMAGENET --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/simmim.py:laptop --data corpus --out RUN

Published: 83.8 % top-1 on ImageNet-1k after fine-tuning (README.md). Not run here at full size. `laptop`: the demo
corpus on 2 CPU cores; squares are single patches, half of them hidden.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'simmim',
        'model': 'vit_base/16',
        'image_size': 224,
        'batch_size': 2048,
        'epochs': 800.0,
        'learning_rate': 1e-4 * 2048 / 512,
        'encoder': {'drop_path': 0.1, 'layer_scale': 0.1, 'kernel_init': 'beit', 'patch_init': ''},
        'objective': {'mask_ratio': 0.6, 'mask_size': 32},
        'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.05, 'warmup_epochs': 10.0, 'clip': 5.0,
                      'clip_scope': 'global', 'final_learning_rate': 0.1 * 1e-4 * 2048 / 512},
        'augment': {'scale': (0.67, 1.0), 'flip': (0.0, 0.5)},
    },
    'laptop': {
        'method': 'simmim',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 800,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'encoder': {'drop_path': 0.0},
        'objective': {'mask_ratio': 0.5, 'mask_size': 16},
        'augment': {'channel_sampling': 'hcs', 'scale': (0.6, 1.0)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
