"""Symile on X-rays, ECGs and laboratory values, Symile-MIMIC (Saporta et al. 2024, arXiv 2411.01053).

Reproduces rajesh-lab/symile, experiments/models/symile_mimic_model.py: a ResNet-50 of X-rays of 320 pixels, a ResNet-18
of 10 s of 12 leads at 500 Hz, scaled to [-1, 1] over the record, an MLP of 50 laboratory values and 50 flags, layer
norms, AdamW with decay 0.01. Batch, rate, width and the first logit scale are given on its command line alone: those
here are ours. Differs: see the method's docstring; the ECG's network is one of 1D convolutions with 12 channels (there
2D ones over time and leads); values of the table are standardised (there percentiles).

  jaxmed train experiments/symile.py --data CORPUS --out RUN loader.table=hematocrit,platelets,creatinine
  jaxmed prepare demo --out corpus && jaxmed train experiments/symile.py:laptop --data corpus --out RUN

CORPUS has a column `signal` and the columns that loader.table names. Published: the right X-ray among 10 for 43.5 % of
ECGs with values, by memory, not read in the repository. Not run here at full size. `laptop`: patches of the demo corpus
and the sentences that say where they lie, two modalities, on 2 CPU cores.
"""

from ml_collections import ConfigDict

PUBLISHED = {
    'method': 'symile',
    'model': 'resnet50',
    'image_size': 320,
    'batch_size': 256,
    'epochs': 80.0,
    'learning_rate': 1e-3,
    'objective': {'out_dim': 512, 'normalize': 'layer_norm', 'negatives': 'shuffled', 'feature': 'cls'},
    'towers': {'signal': {'model': 'resnet18', 'options': {'normalize': 'record_range'}},
               'table': {'model': 'table_mlp', 'options': {'hidden': (256, 1024)}}},
    'optimizer': {'weight_decay': 0.01},
    'augment': {'scale': (1.0, 1.0), 'flip': (0.0,)},
}

VARIANTS = {
    'published': PUBLISHED,
    'laptop': {
        'method': 'symile',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 800,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'objective': {'out_dim': 128},
        'towers': {'text': {'model': 'text_micro'}},
        'augment': {'scale': (0.9, 1.0), 'channel_sampling': 'hcs'},
        'loader': {'label': 'region', 'text_length': 144},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
