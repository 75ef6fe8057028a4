"""ChannelViT and ViT over the number of channels that training shows (Bao et al. 2024, arXiv 2309.16108).

Supervised with hierarchical channel sampling, the recipe of experiments/channel_vit/fewer_channels.py; the cells differ
in the channels that records show in training (`loader.missing` hides the others) and in the encoder. Every cell is
judged on images with all channels, as the paper's models of missing channels are: a ChannelViT meets channels whose
embedding it never trained, a ViT inputs that were always zero.

  jaxmed prepare JUMPCP --layout jumpcp --out CORPUS
  jaxmed study experiments/studies/channels.py --data CORPUS --out study
  jaxmed prepare demo --out corpus
  jaxmed study experiments/studies/channels.py:laptop --data corpus --out study

`published`: 1, 2, 4 and 8 channels of JUMP-CP, patch 16. Not run here at full size. `laptop`: T1, then tissue maps
beside it, of the demo corpus; minutes on 2 CPU cores.
"""

from jaxmed.study.grid import Study

BASE = 'experiments/channel_vit/fewer_channels.py'
VARIANTS = ('published', 'laptop')
STUDIES = {
    'published': Study(
        BASE, {'encoder': {'channel_vit': {}, 'vit': {'model': 'vit_small/16', 'encoder.patch_init': 'torch'}},
               'channels': (1, 2, 4, 8), 'seed': (0, 1, 2)},
        judges=('loss', {'task': 'classify', 'label': 'label'})),
    'laptop': Study(
        f'{BASE}:laptop', {'encoder': {'channel_vit': {}, 'vit': {'model': 'vit_micro/16'}},
                           'channels': ('T1', 'T1,GM', 'all'), 'seed': (0, 1)},
        judges=('loss', {'task': 'classify', 'label': 'region'}),
        shared={'steps': 200, 'eval_every': 200, 'checkpoint_every': 100}),
}


def get_study(variant: str = 'published') -> Study:
  """The grid of a variant."""
  return STUDIES[variant]
