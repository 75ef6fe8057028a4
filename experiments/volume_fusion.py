"""Volume Fusion on volumes of heads, as OpenMind's table has it (Wang et al. 2023, arXiv 2306.16925).

Reproduces MIC-DKFZ/nnssl, VolumeFusionTrainer_BS8: a ResEnc-L on crops of 160^3 voxels, z-scores, 8 a step, five
coefficients, 10 to 39 boxes of 8 to 100 voxels, SGD (Nesterov 0.99) at 1e-2, 250,000 steps, cross-entropy and Dice of
all five, flips. Differs: see the method's docstring (nnssl mixes the halves of 16 crops, none of which is used twice;
its boxes lie whole in the crop and may have coefficient 0); sides are shares of the crop, 10 to 100 voxels; z-scores
are those of a crop (there of a volume); none of nnU-Net's changes of intensity, which are augment.*_probability. The
paper trains a network of its own, PCT-Net, on 110,000 CT volumes: 64 x 128 x 128 voxels, 4 a step, Adam at 1e-3,
400,000 steps.

  jaxmed prepare SCANS --out heads --volumes whole --spacing 1
  jaxmed train experiments/volume_fusion.py --data heads --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/volume_fusion.py:laptop --data corpus --out RUN

Published: on heads, chests and abdomens above training from scratch after fine-tuning (abstract). Not run here at full
size. `laptop`: the demo corpus on 2 CPU cores.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'volume_fusion',
        'model': 'resenc_l',
        'image_size': 160,
        'batch_size': 8,
        'steps': 250_000,
        'learning_rate': 1e-2,
        'objective': {'classes': 4, 'boxes': (10, 39), 'sides': (0.0625, 0.625)},
        'optimizer': {'name': 'sgd', 'b1': 0.99, 'weight_decay': 3e-5, 'clip': 12.0, 'annealing': 'poly',
                      'warmup_steps': 0},
        'augment': {'scale': (1.0, 1.0), 'flip': (0.5,)},
        'loader': {'fit': 'crop', 'load_size': 160, 'normalize': 'image'},
    },
    'laptop': {
        'method': 'volume_fusion',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 400,
        'learning_rate': 1e-3,
        'eval_every': 200,
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
