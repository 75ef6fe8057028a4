"""GTP-4o: a graph of modalities whose missing nodes prompts complete (ECCV 2024, arXiv 2407.05540).

After the paper's account; no code of the authors was found, so that every number here is ours. Differs: see the
method's docstring; slides are images, genes the columns of a table (there graphs of cells too).

  jaxmed train experiments/gtp4o.py --data CORPUS --out RUN loader.label=grade loader.table=IDH1,TP53
  jaxmed prepare demo --out corpus && jaxmed train experiments/gtp4o.py:laptop --data corpus --out RUN

CORPUS has the column `text` and those that loader.table names; cells may be empty. Published: grading of TCGA-GBMLGG
and survival of KIRC, numbers not read. Not run here at full size. `laptop`: patches of the demo corpus and the
sentences that say where they lie, on 2 CPU cores.
"""

from ml_collections import ConfigDict

PUBLISHED = {
    'method': 'gtp4o',
    'model': 'vit_small/16',
    'image_size': 224,
    'batch_size': 32,
    'epochs': 50.0,
    'learning_rate': 1e-4,
    'objective': {'dim': 256, 'depth': 2, 'prompts': 4, 'threshold': 0.0},
    'towers': {'text': {'model': 'text_clip_base'}, 'table': {'model': 'table_micro'}},
    'loader': {'label': 'grade'},
}

VARIANTS = {
    'published': PUBLISHED,
    'laptop': {
        'method': 'gtp4o',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 400,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'augment': {'scale': (0.9, 1.0), 'channel_sampling': 'hcs'},
        'loader': {'label': 'region', 'text_length': 144},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
