"""Phases of operations by TeCNO: two causal stages over a frozen ResNet-50 (Czempiel et al. 2020, arXiv 2003.10751).

Reproduces stage 2 of tobiascz/TeCNO, modules/mstcn: 2 stages of 8 layers and 32 maps, Adam at 7e-5, 12 epochs, a video
a step. The weights of the classes of Cholec80 there (datasets/cholec80.py) are, in the order of names that
`objective.class_weights` has, 0.1909 CalotTriangleDissection, 0.9840 CleaningCoagulation, 1 ClippingCutting, 0.2503
GallbladderDissection, 1.9176 GallbladderPackaging, 2.1747 GallbladderRetraction, 1.6411 Preparation. Differs: they are
not set, as they are of that corpus; one softmax in the loss (there two, `objective.double_softmax=True`); the last
epoch, not the best by accuracy; videos longer than `loader.window` frames are cut; features are computed in the step.
Stage 1, a ResNet-50 on phases and tools, is a run of its own: give it as init=RUN.

  jaxmed train experiments/phases.py --data FRAMES --out RUN init=ENCODER
  jaxmed train experiments/phases.py --data FRAMES --out RUN init=ENCODER objective.head=ms_tcn objective.smoothing=0.15
  jaxmed prepare demo --out corpus && jaxmed train experiments/phases.py:laptop --data corpus --out RUN

FRAMES is a corpus of frames with columns `phase` and `frame_seconds`, a subject a video (docs/guide/surgical.md).
Published: 88.56 % accuracy on Cholec80 (from memory, not checked). Not run here at full size. `laptop`: regions of the
demo corpus on 2 CPU cores, windows of 4 patches, an encoder that is trained too.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'phases',
        'model': 'resnet50',
        'image_size': 224,
        'batch_size': 1,
        'epochs': 12.0,
        'learning_rate': 7e-5,
        'objective': {'head': 'tecno', 'smoothing': 0.0, 'stage_sum': 'mean', 'double_softmax': False,
                      'freeze_encoder': True, 'feature': 'cls', 'dropout': 0.5},
        'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.0, 'warmup_epochs': 0.0, 'annealing': 'none'},
        'augment': {'scale': (1.0, 1.0), 'flip': (0.0, 0.0)},
        'loader': {'label': 'phase', 'window': 6144, 'window_group': 'subject', 'window_order': 'frame_seconds'},
    },
    'laptop': {
        'method': 'phases',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 8,
        'steps': 400,
        'learning_rate': 1e-3,
        'eval_every': 200,
        'objective': {'layers': 2, 'freeze_encoder': False, 'dropout': 0.1, 'smoothing': 0.15},
        'loader': {'label': 'region', 'window': 4, 'window_group': 'path', 'window_order': 'id'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
