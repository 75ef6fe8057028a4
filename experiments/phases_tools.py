"""Phase and tools of frames of operations by one ResNet-50: stage 1 of TeCNO (Czempiel et al. 2020, arXiv 2003.10751).

Reproduces tobiascz/TeCNO, modules/cnn: from ImageNet weights, 15 epochs of Adam at 5e-4, 80 frames a step, the
cross-entropy of phases and the binary one of tools, each weighed by a learned s. With the defaults of the method
instead the phases are read of the features beside the tools, and both losses are added: EndoNet (Twinanda et al. 2017).
Differs: class weights are those of a corpus and not set (experiments/phases.py has Cholec80's); crops of at least 0.44
of the frame, turned by up to 15 degrees (there shifted by a tenth, zoomed by 0.8 to 1.5 and turned, with 0.7, amid
zeros); the last epoch, not the best by accuracy.

  jaxmed train experiments/phases_tools.py --data FRAMES --out RUN init=IMAGENET
  jaxmed train experiments/phases_tools.py:laptop --data FRAMES --out RUN

FRAMES is a corpus of frames with a column `phase` and a signal of one row, 0 or 1 a tool (docs/guide/surgical.md).
Published: no number of this stage alone was read. Not run here at full size. `laptop`: a small ViT for a corpus of your
own, as no demo corpus has tools.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'phases_tools',
        'model': 'resnet50',
        'image_size': 224,
        'batch_size': 80,
        'epochs': 15.0,
        'learning_rate': 5e-4,
        'objective': {'tools_first': False, 'joint': 'learned', 'feature': 'cls', 'freeze_encoder': False},
        'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.0, 'warmup_epochs': 0.0, 'annealing': 'none'},
        'augment': {'scale': (0.44, 1.0), 'ratio': (1.0, 1.0), 'rotate': 15.0, 'flip': (0.0, 0.0)},
        'loader': {'label': 'phase', 'signal_length': 1},
    },
    'laptop': {
        'method': 'phases_tools',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 800,
        'learning_rate': 1e-3,
        'eval_every': 200,
        'loader': {'label': 'region', 'signal_length': 1},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
