"""Models Genesis: a U-Net restores CT cubes (Zhou et al. 2021, arXiv 2004.07882), and as in OpenMind's table.

Reproduces MrGiovanni/ModelsGenesis, pytorch/ (config.py, utils.py, Genesis_Chest_CT.py): cubes of CT between -1000 and
1000 HU, SGD at a rate of 1 without decay, 6 cubes a step. `openmind` is MIC-DKFZ/nnssl's ModelGenesisTrainer_BS8: a
ResEnc-L on crops of 160^3 voxels, z-scores, 8 a step, SGD (Nesterov 0.99) at 1e-2, 250,000 steps. Differs: see the
method's docstring; cubes of 64^3 (there 64 x 64 x 32, cut beforehand); the first convolution of a stage has all of its
channels (there half); 250,000 steps of a cosine (there until 50 epochs bring nothing, at most 10,000, the rate halved
every 40); z-scores are those of a crop (there of a volume).

  jaxmed prepare SCANS --out ct --volumes whole
  jaxmed train experiments/models_genesis.py --data ct --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/models_genesis.py:laptop --data corpus --out RUN

Published: above training from scratch in all five tasks of three dimensions that it was fine-tuned on (abstract). Not
run here at full size. `laptop`: the demo corpus on 2 CPU cores.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'models_genesis',
        'model': 'nnunet_plain',
        'image_size': 64,
        'batch_size': 6,
        'steps': 250_000,
        'learning_rate': 1.0,
        'encoder': {'depths': (2, 2, 2, 2), 'dims': (64, 128, 256, 512), 'norm': 'batch', 'down': 'max', 'slope': 0.0},
        'objective': {'shuffle': 0.5, 'nonlinear': 0.9, 'paint': 0.9, 'outpaint': 0.8},
        'optimizer': {'name': 'sgd', 'b1': 0.9, 'weight_decay': 0.0, 'warmup_steps': 0},
        'augment': {'scale': (1.0, 1.0), 'flip': (0.15,)},
        'loader': {'fit': 'crop', 'load_size': 64, 'normalize': 'window:-1000:1000'},
    },
    'openmind': {
        'method': 'models_genesis',
        'model': 'resenc_l',
        'image_size': 160,
        'batch_size': 8,
        'steps': 250_000,
        'learning_rate': 1e-2,
        'optimizer': {'name': 'sgd', 'b1': 0.99, 'weight_decay': 3e-5, 'clip': 12.0, 'annealing': 'poly',
                      'warmup_steps': 0},
        'augment': {'scale': (1.0, 1.0), 'flip': (0.15,)},
        'loader': {'fit': 'crop', 'load_size': 160, 'normalize': 'image'},
    },
    'laptop': {
        'method': 'models_genesis',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 400,
        'learning_rate': 1e-3,
        'eval_every': 200,
        'augment': {'channel_sampling': 'hcs'},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
