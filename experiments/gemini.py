"""GEMINI: a 3D U-Net on brain MR, by flows between people whose features agree (He et al. 2025, arXiv 2502.05282).

Reproduces YutingHe-list/GEMINI, GEMINI_SS_MIP/GEMINI_SS_MIP_3d.py: a U-Net of group norm, 32 to 512 channels wide, one
pair of volumes a step, 1000 epochs of 200 steps, Adam at 1e-4, one pose of both volumes (20 degrees, a zoom of 0.75 to
1.25). Differs: see the method's docstring; features leave the decoder through a linear layer, there through its last
activation; the way up has a 1x1 convolution; the network sees intensities of zero mean and unit deviation (there 0 to
1); volumes are prepared at one size, of which the code says nothing. They should hold the same part of the body, whole.

  jaxmed prepare SCANS --out brains --volumes whole --spacing 1
  jaxmed train experiments/gemini.py --data brains --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/gemini.py:laptop --data corpus --out RUN

Published: better than other pretraining on seven data sets (abstract). Not run here at full size. `laptop`: slices of
the demo corpus on 2 CPU cores.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'gemini',
        'model': 'nnunet_plain',
        'image_size': 128,
        'batch_size': 2,
        'steps': 200_000,
        'learning_rate': 1e-4,
        'encoder': {'depths': (2, 2, 2, 2, 2), 'dims': (32, 64, 128, 256, 512), 'norm': 'group', 'down': 'max',
                    'slope': 0.2},
        'objective': {'decoder': 'unet', 'decoder_options': {'up': 'linear', 'slope': 0.2}},
        'optimizer': {'weight_decay': 0.0, 'warmup_steps': 0, 'annealing': 'none'},
        'loader': {'normalize': 'image'},
    },
    'laptop': {
        'method': 'gemini',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 8,
        'steps': 300,
        'learning_rate': 5e-4,
        'eval_every': 100,
        'objective': {'feature_dim': 16, 'flow_dims': (16, 32, 32)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
