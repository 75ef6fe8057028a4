"""DeepCluster-v2: ResNet-50 on ImageNet-1k, 800 epochs, multi-crop (Caron et al. 2020, arXiv 2006.09882, appendix).

Reproduces facebookresearch/swav, scripts/deepclusterv2_800ep_pretrain.sh: batch 4096, rate 4.8 to 0.0048, decay 1e-6,
warm-up of 10 epochs, 2 x 224 and 6 x 96 crops, three sets of 3000 prototypes without gradients. Differs: rates of LARS
adapt weights alone (their LARC adapts and decays biases and norms too); the warm-up starts at 0 (there 0.3);
the epoch that fills the bank is the first of the 800 (there one before them); and what experiments/README.md says of
colours.

  jaxmed train experiments/deepcluster.py --data IMAGENET --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/deepcluster.py:laptop --data corpus --out RUN

Published: 75.2 % top-1 on ImageNet-1k, linear (README.md); 64 V100. Not run here at full size. `laptop`: the demo
corpus on 2 CPU cores, three sets of 64 prototypes.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'deepcluster',
        'model': 'resnet50',
        'image_size': 224,
        'batch_size': 4096,
        'epochs': 800.0,
        'learning_rate': 4.8,
        'objective': {'num_prototypes': 3000, 'num_sets': 3, 'temperature': 0.1, 'kmeans_iterations': 10,
                      'hidden_dim': 2048, 'out_dim': 128},
        'optimizer': {'name': 'lars', 'b1': 0.9, 'weight_decay': 1e-6, 'warmup_epochs': 10.0,
                      'final_learning_rate': 0.0048},
        'augment': {'views': 2, 'local_views': 6, 'local_size': 96, 'scale': (0.14, 1.0), 'local_scale': (0.05, 0.14),
                    'flip': (0.0, 0.5), 'jitter_probability': (0.8,), 'brightness': 1.6, 'contrast': 0.8,
                    'color': (0.8, 0.2), 'grayscale': (0.2,), 'blur': 2.0, 'blur_probability': (0.5,)},
    },
    'laptop': {
        'method': 'deepcluster',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 600,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'objective': {'num_prototypes': 64, 'hidden_dim': 512},
        'augment': {'views': 2, 'local_views': 4, 'local_size': 32, 'scale': (0.4, 1.0), 'local_scale': (0.1, 0.4),
                    'channel_sampling': 'hcs', 'jitter_probability': (0.8,), 'brightness': 0.2, 'contrast': 0.2,
                    'color': (0.1, 0.05), 'grayscale': (0.0,)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
