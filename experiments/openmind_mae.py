"""Masked autoencoding of volumes of heads, as OpenMind's table has it (Wald et al. 2024, arXiv 2412.17041, 2410.23132).

Reproduces MIC-DKFZ/nnssl, BaseMAETrainer_BS8: a ResEnc-L on crops of 160^3 voxels, z-scores, 8 a step, three in four
blocks of 16^3 set to zero, squared error of their voxels, rotations and zooms of a fifth of the crops, flips, SGD
(Nesterov 0.99) at 1e-2, decay 3e-5, (1 - t)^0.9 over 1000 epochs of 250 steps. `spark` is SparkMAETrainer_BS8: hidden
places left out of all layers, tokens in their place before the decoder. `primus` is BaseEvaMAETrainer_BS8: patches of
8^3, which Primus-M does not see, AdamW. Differs: see the method's docstring; z-scores are those of a crop (there of a
volume); what a rotation turns in repeats the border (there 0). Of Primus: rotary positions alone (there a learned table
besides), no norm inside of attention, a decoder whose positions are a table and whose MLP has GELU.

  jaxmed prepare SCANS --out heads --volumes whole --spacing 1
  jaxmed train experiments/openmind_mae.py --data heads --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/openmind_mae.py:laptop --data corpus --out RUN

`jaxmed finetune RUN --task segment` is the stage with masks (experiments/finetune_segment.py). Published: MAE of
ResEnc-L raises the mean Dice by about 3 points over nnU-Net (abstract of arXiv 2410.23132). Not run here at full size.
`laptop`: the demo corpus on 2 CPU cores, a U-Net and sparse convolutions.
"""

from ml_collections import ConfigDict

SGD = {'name': 'sgd', 'b1': 0.99, 'weight_decay': 3e-5, 'clip': 12.0, 'annealing': 'poly', 'warmup_steps': 0}
MAE = {
    'method': 'spark',
    'model': 'resenc_l',
    'image_size': 160,
    'batch_size': 8,
    'steps': 250_000,
    'learning_rate': 1e-2,
    'objective': {'hide': 'zeros', 'mask_ratio': 0.75, 'mask_size': 16},
    'optimizer': SGD,
    'augment': {'scale': (1.0, 1.0), 'flip': (0.5,), 'rotation_probability': (0.2,), 'zoom_probability': (0.2,)},
    'loader': {'fit': 'crop', 'load_size': 160, 'normalize': 'image'},
}

VARIANTS = {
    'published': MAE,
    'spark': MAE | {'objective': {'hide': 'sparse', 'mask_ratio': 0.75, 'mask_size': 16}},
    'primus': MAE | {
        'method': 'mae',
        'model': 'vit_base/8',
        'learning_rate': 3e-4,
        'encoder': {'embed_dim': 864, 'depth': 16, 'num_heads': 12, 'pos': 'rope', 'class_token': False,
                    'layer_scale': 0.1, 'drop_path': 0.2, 'mlp': 'swiglu', 'mlp_ratio': 8 / 3},
        'objective': {'mask_ratio': 0.75, 'norm_pixels': False, 'decoder_dim': 864, 'decoder_depth': 2,
                      'decoder_heads': 12},
        'optimizer': {'b1': 0.9, 'b2': 0.98, 'weight_decay': 0.05, 'clip': 1.0, 'annealing': 'poly',
                      'warmup_steps': 12_500},
    },
    'laptop': {
        'method': 'spark',
        'model': 'resenc_micro',
        'image_size': 48,
        'batch_size': 32,
        'steps': 300,
        'learning_rate': 1e-3,
        'eval_every': 150,
        'objective': {'mask_ratio': 0.6, 'mask_size': 8},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
