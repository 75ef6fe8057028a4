"""MindEye's contrast, on images and texts (Scotti et al. 2023, arXiv 2305.18274).

Of MedARC-AI/fMRI-reconstruction-NSD are both losses with their schedule, batches of 32, 240 epochs, AdamW at 3e-4
with decay 0.01. Differs: see the method's docstring; there activity of the brain meets a frozen CLIP's tokens of the
image that was seen; the rate rises and falls over the whole run there (OneCycle), here it rises over its first tenth.

  jaxmed train experiments/mind_eye.py --data CORPUS --out RUN towers.text.init=FILE freeze=text
  jaxmed prepare demo --out corpus && jaxmed train experiments/mind_eye.py:laptop --data corpus --out RUN

CORPUS has a column `text`. Published: 97.2 % of 300 images are found again (Retrievals.py, first subject). Not
run here at full size. `laptop`: patches of the demo corpus and the sentences that say where they lie, on 2 CPU cores.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'mind_eye',
        'model': 'vit_base/16',
        'image_size': 224,
        'batch_size': 32,
        'epochs': 240.0,
        'learning_rate': 3e-4,
        'objective': {'out_dim': 768, 'mix_share': 0.33, 'mix_temperature': 0.006, 'mix_beta': 0.15,
                      'temperature': 0.004, 'final_temperature': 0.0075},
        'towers': {'text': {'model': 'text_clip_base'}},
        'optimizer': {'weight_decay': 0.01},
        'loader': {'tokenizer': 'clip', 'text_length': 77},
    },
    'laptop': {
        'method': 'mind_eye',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 800,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'objective': {'out_dim': 128, 'temperature': 0.05, 'final_temperature': 0.07, 'mix_temperature': 0.07},
        'augment': {'scale': (0.9, 1.0)},
        'loader': {'label': 'region', 'text_length': 144},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
