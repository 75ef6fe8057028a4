"""CLIP: ViT-B/32 and a text transformer on images and their texts (Radford et al. 2021, arXiv 2103.00020).

Reproduces mlfoundations/open_clip, model_configs/ViT-B-32.json with src/open_clip_train/params.py, by the README's
command for LAION-400M: a text tower of width 512, 12 blocks and 8 heads, vectors of 512, 32 epochs in batches of 128 x
256, AdamW at 5e-4 with decay 0.2, 2,000 steps of warm-up, crops of 0.9 to 1. Differs: see the method's docstring and
that of models/text/transformer.py; AdamW's epsilon is 1e-8 (there 1e-6). Texts are 77 ids
of CLIP's pairs of bytes; `laptop` has bytes.

  jaxmed train experiments/clip.py --data CORPUS --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/clip.py:laptop --data corpus --out RUN

CORPUS has a column `text`. Published: 62.96 % on ImageNet-1k without its labels (docs/PRETRAINED.md). Not run here at
full size. `laptop`: patches of the demo corpus and the sentences that say where they lie, on 2 CPU cores.
"""

from ml_collections import ConfigDict

PUBLISHED = {
    'method': 'clip',
    'model': 'vit_base/32',
    'image_size': 224,
    'batch_size': 32768,
    'epochs': 32.0,
    'learning_rate': 5e-4,
    'encoder': {'norm_epsilon': 1e-5},
    'objective': {'out_dim': 512, 'temperature': 0.07, 'max_scale': 100.0, 'weight': 0.5, 'feature': 'cls'},
    'towers': {'text': {'model': 'text_clip_base'}},
    'optimizer': {'b1': 0.9, 'b2': 0.98, 'weight_decay': 0.2, 'warmup_steps': 2000},
    'augment': {'scale': (0.9, 1.0), 'flip': (0.0,)},
    'loader': {'tokenizer': 'clip', 'text_length': 77},
}

VARIANTS = {
    'published': PUBLISHED,
    'laptop': {
        'method': 'clip',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 800,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'objective': {'out_dim': 128},
        'augment': {'scale': (0.9, 1.0), 'channel_sampling': 'hcs'},
        'loader': {'label': 'region', 'text_length': 144},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
