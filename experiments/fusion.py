"""Fusion of frames and words, after surgical feedback, with staged training (arXiv 2312.03231).

Reproduces the head of arushig100/Multi-Modal-SSL-for-Surgical-Feedback-Effectiveness-Assessment,
code/finetune_multimodal.py: vectors of video and words side by side in an MLP, 20 epochs in batches of 16. Its towers
are frozen there (VideoMAE, sentence embeddings) and trained here, each by itself in the first half of a run and then
together, as arXiv 2312.03231 finds best for the categories of feedback; that work has no code. Differs: see the
method's docstring; records are frames; the rate is ours, that of the head alone being 1e-3.

  jaxmed train experiments/fusion.py --data CORPUS --out RUN loader.label=effective
  jaxmed prepare demo --out corpus && jaxmed train experiments/fusion.py:laptop --data corpus --out RUN

CORPUS has the column `text`, and signals or a table where towers.signal or towers.table is named. Split it by case:
the published split is by clip, so that surgeons and cases leak. Published: AUROC of 0.70 +- 0.02 by that split. Not run
here at full size. `laptop`: patches of the demo corpus and the sentences that say where they lie, on 2 CPU cores.
"""

from ml_collections import ConfigDict

PUBLISHED = {
    'method': 'fusion',
    'model': 'vit_base/16',
    'image_size': 224,
    'batch_size': 16,
    'epochs': 20.0,
    'learning_rate': 1e-4,
    'objective': {'kind': 'early', 'dim': 128, 'hidden': 256, 'pooled': True, 'feature': 'mean', 'staged': 0.5},
    'towers': {'text': {'model': 'text_clip_base'}},
    'optimizer': {'weight_decay': 0.01},
    'loader': {'label': 'effective'},
}

VARIANTS = {
    'published': PUBLISHED,
    'laptop': {
        'method': 'fusion',
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
