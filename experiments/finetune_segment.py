"""Fine-tuning a ResEnc-L on masks as nnssl does (Wald et al. 2024, arXiv 2412.17041), by the loss of nnU-Net v2.

Reproduces MIC-DKFZ/nnUNet, nnUNetTrainer/pretraining/pretrainedTrainer.py: encoder and stem from pretraining, a fresh
decoder, crops of 160^3, 2 volumes a step, SGD (Nesterov 0.99) at 1e-3, decay 3e-5, gradients of at most 12, a rise
over 50 of 1000 epochs of 250 steps, then (1 - t)^0.9, no deep supervision. `scratch` is its control at 1e-2, `short`
the 150 epochs with a rise over 15, `nnunet` nnU-Net's own training from scratch: deep supervision, no rise. Differs:
see the list of nnU-Net in the guide of views; crops are read at their own size (there 257^3), so that what turns in
repeats the border; the rate changes at every step, not every epoch; biases and norms do not decay; the best checkpoint
by Dice on held-out crops is kept beside the last. Patches of `nnunet` are 128^3 here, there planned for each dataset.
Where left and right are classes, set augment.flip=0.

  jaxmed train experiments/finetune_segment.py --data VOLUMES --out TUNED init=RUN
  jaxmed train experiments/finetune_segment.py:scratch --data VOLUMES --out SCRATCH
  jaxmed prepare tissue --out tissue && jaxmed train experiments/finetune_segment.py:laptop --data tissue --out RUN

`jaxmed finetune RUN --task segment --label mask` takes the model from a run and these values as its recipe. Published:
MAE pretraining on 39k brain volumes raises the mean Dice of ResEnc-L by about 3 points over nnU-Net (abstract of arXiv
2410.23132). Not run here at full size. `laptop`: tissues of T1 slices on 2 CPU cores, from fresh weights.
"""

from ml_collections import ConfigDict

OPTIMIZER = {'name': 'sgd', 'b1': 0.99, 'weight_decay': 3e-5, 'clip': 12.0, 'annealing': 'poly'}
AUGMENT = {'scale': (1.0, 1.0), 'brightness': 0.0, 'contrast': 0.0, 'gamma': 0.0, 'blur': 0.0, 'flip': (0.5,),
           'rotation_probability': (0.2,), 'zoom_probability': (0.2,), 'noise_probability': (0.1,),
           'soften_probability': (0.2,), 'multiply_probability': (0.15,), 'stretch_probability': (0.15,),
           'coarse_probability': (0.25,), 'inverted_power_probability': (0.1,), 'power_probability': (0.3,)}
NNSSL = {
    'method': 'segment',
    'model': 'resenc_l',
    'image_size': 160,
    'batch_size': 2,
    'steps': 250_000,
    'learning_rate': 1e-3,
    'eval_every': 12_500,
    'checkpoint_every': 12_500,
    'evaluators': 'loss,dice',
    'objective': {'decoder': 'unet', 'deep_supervision': False},
    'optimizer': OPTIMIZER | {'warmup_steps': 12_500},
    'augment': AUGMENT,
    'loader': {'fit': 'crop', 'load_size': 160, 'foreground': 0.33},
}

VARIANTS = {
    'published': NNSSL,
    'scratch': NNSSL | {'learning_rate': 1e-2},
    'short': NNSSL | {'steps': 37_500, 'optimizer': OPTIMIZER | {'warmup_steps': 3750}},
    'nnunet': NNSSL | {'image_size': 128, 'learning_rate': 1e-2, 'optimizer': OPTIMIZER | {'warmup_steps': 0},
                       'objective': {'decoder': 'unet', 'deep_supervision': True},
                       'loader': {'fit': 'crop', 'load_size': 128, 'foreground': 0.33}},
    'laptop': {
        'method': 'segment',
        'model': 'resenc_micro',
        'image_size': 48,
        'batch_size': 16,
        'steps': 300,
        'learning_rate': 1e-2,
        'eval_every': 100,
        'evaluators': 'loss,dice',
        'objective': {'decoder': 'unet'},
        'optimizer': OPTIMIZER | {'warmup_steps': 15},
        'augment': {'blur': 0.0},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
