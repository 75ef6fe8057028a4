"""A mixture like PreCT-160K: volumes of many collections, evened out (Wu et al. 2024, VoCo v2, arXiv 2410.09890).

PreCT-160K is 160,000 CT volumes of public collections in three groups: abdomen, head and neck, chest
(Luffy03/Large-Scale-Medical, README.md, Self-supervised/utils/data_utils.py). Reproduced is how such a set is read, not
VoCo: random crops of whole volumes of 1.5 mm (`jaxmed prepare --spacing 1.5`), window -175 to 250 HU, masked
autoencoding in its place, as many volumes as there (2,000,000 steps of 16). Collections are corpora of their own, given
as --data A,B,C. Their shares are in proportion to the square root of their volumes; within a collection patients are
drawn alike. `modality` is for sets that hold more than CT: shares by the column `modality`, to the power 0.3, each
volume between its own percentiles; it has no source. Differs: the method, and with it the optimizer's constants, which
are MAE's; chest volumes have the same window and spacing (there -1000 to 500 HU, 1.25 x 1.25 x 5 mm); shares, there 8
passes over abdomen and over head and neck for one over the chest.

  jaxmed train experiments/prect.py --data abdomen,chest,head --out RUN
  jaxmed train experiments/prect.py:modality --data ct,mr,pet --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/prect.py:laptop --data corpus --out RUN

Published: VoCo v2, on these volumes, leads on most of 51 tasks (abstract). Not run here at full size. `laptop`: the
demo corpus on 2 CPU cores, its sources evened out and its images crops.
"""

from ml_collections import ConfigDict

PUBLISHED = {
    'method': 'mae',
    'model': 'vit_base/16',
    'image_size': 96,
    'batch_size': 256,
    'steps': 125_000,
    'learning_rate': 1.5e-4,
    'objective': {'mask_ratio': 0.75, 'norm_pixels': True, 'decoder_dim': 512, 'decoder_depth': 8,
                  'decoder_heads': 16},
    'optimizer': {'b1': 0.9, 'b2': 0.95, 'weight_decay': 0.05, 'warmup_steps': 5000},
    'augment': {'scale': (0.5, 1.0)},
    'loader': {'fit': 'crop', 'normalize': 'window:-175:250', 'balance': 'dataset', 'alpha': 0.5,
               'subjects': 'balanced'},
}

VARIANTS = {
    'published': PUBLISHED,
    'modality': PUBLISHED | {'loader': {'fit': 'crop', 'normalize': 'percentile', 'balance': 'modality', 'alpha': 0.3,
                                        'subjects': 'balanced'}},
    'laptop': {
        'method': 'mae',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 600,
        'learning_rate': 1e-3,
        'eval_every': 200,
        'objective': {'mask_ratio': 0.5, 'unsampled': 'predict'},
        'augment': {'channel_sampling': 'hcs', 'scale': (0.6, 1.0)},
        'loader': {'label': 'region', 'fit': 'crop', 'balance': 'source', 'alpha': 0.5, 'subjects': 'balanced'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
