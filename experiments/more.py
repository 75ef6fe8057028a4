"""MoRE: X-rays and ECGs around their report (arXiv 2410.16239).

Reproduces svthapa/MoRE, pretrain_multimodel.py and utils/build_model.py: ViT-B/16 of X-rays of 224 pixels, one
of width 768 over 10 s of 12 leads at 100 Hz, whose leads are scaled to [-1, 1], projections to 128 with batch norm, a
fixed temperature of 0.02, AdamW at 3e-5 with decay 0.1, 4 batches of 100 to an update. Differs: see the method's
docstring; half a cosine over the run (there warm restarts every 10 epochs down to 3e-6); negatives are those of the
100 records of a part of the update there, and of all 400 here; an ECG has 40 patches of 25 steps (there 196).

  jaxmed train experiments/more.py --data CORPUS --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/more.py:laptop --data corpus --out RUN

CORPUS has the columns `text` and `signal`; docs/guide/signals.md says how ECGs are brought to 100 Hz. Published: no
number that a run of this recipe alone would show. Not run here at full size. `laptop`: patches of the demo corpus and
the sentences that say where they lie, without signals, on 2 CPU cores.
"""

from ml_collections import ConfigDict

PUBLISHED = {
    'method': 'more',
    'model': 'vit_base/16',
    'image_size': 224,
    'batch_size': 400,
    'epochs': 50.0,
    'learning_rate': 3e-5,
    'objective': {'out_dim': 128, 'hidden_dim': 768, 'temperature': 0.02, 'feature': 'cls'},
    'towers': {'text': {'model': 'text_clip_base', 'options': {'causal': False, 'pool': 'mean', 'embed_dim': 768,
                                                               'num_heads': 12}},
               'signal': {'model': 'vit_base/25', 'options': {'normalize': 'lead_range'}}},
    'encoder': {'qkv_bias': False},
    'optimizer': {'weight_decay': 0.1},
    'loader': {'text_length': 512},
    'augment': {'scale': (0.3, 0.9), 'flip': (0.0, 0.5), 'jitter_probability': (0.8,), 'brightness': 0.3,
                'contrast': 0.3},
}

VARIANTS = {
    'published': PUBLISHED,
    'laptop': {
        'method': 'more',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 800,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'objective': {'hidden_dim': 128, 'temperature': 0.07},
        'augment': {'scale': (0.9, 1.0), 'channel_sampling': 'hcs'},
        'loader': {'label': 'region', 'text_length': 144},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
