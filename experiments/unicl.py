"""UniCL as MedImageInsight trains it: labels and texts of medical images (Codella et al. 2024, arXiv 2410.06542).

Of the shipped configuration (2024.09.27/config.yaml, as others that read it tell) are batches of 1,024, AdamW at 1e-5
with decay 0.2, gradients of at most 1, an average of the weights of 0.999, crops of 0.8 to 1 without flips, images of
480, a tower of texts of width 1,024 and 16 blocks that looks both ways, 77 of CLIP's pairs of bytes, vectors of
1,024. Differs: the encoder is a ViT-L/16 (there a DaViT of 0.36 billion, which is not built); see the method's
docstring; no TrivialAugment and no erased parts; the number of steps is not told, here 100,000.

  jaxmed train experiments/unicl.py --data CORPUS --out RUN loader.label=COLUMN
  jaxmed prepare demo --out corpus && jaxmed train experiments/unicl.py:laptop --data corpus --out RUN

CORPUS has a column `text`, which captions of a label may replace (`loader.captions`). Published: no number was read.
Not run here at full size. `laptop`: patches of the demo corpus with their region as label, on 2 CPU cores.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'unicl',
        'model': 'vit_large/16',
        'image_size': 480,
        'batch_size': 1024,
        'steps': 100_000,
        'learning_rate': 1e-5,
        'objective': {'out_dim': 1024},
        'towers': {'text': {'model': 'text_clip_base', 'options': {'embed_dim': 1024, 'depth': 16, 'num_heads': 16,
                                                                   'causal': False}}},
        'optimizer': {'weight_decay': 0.2, 'clip': 1.0, 'ema': 0.999},
        'augment': {'scale': (0.8, 1.0), 'flip': (0.0,)},
        'loader': {'tokenizer': 'clip', 'text_length': 77},
    },
    'laptop': {
        'method': 'unicl',
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
