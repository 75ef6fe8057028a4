"""SigLIP: ViT-B/16 and a text transformer on images and their texts (Zhai et al. 2023, arXiv 2303.15343).

The networks are those of google-research/big_vision, configs/proj/image_text/SigLIP_demo.ipynb (B/16, 224), and of
mlfoundations/open_clip, model_configs/ViT-B-16-SigLIP.json. No file of their training is released but one on COCO with
a frozen encoder (siglip_lit_coco.py), of which warm-up and clipping are taken; the rest is the paper's: batches of
32,768, a rate of 1e-3, 1e-4 of the weights a step as decay (a tenth as AdamW counts it), b2 of 0.95, 9 billion pairs.
Differs: see the method's docstring and that of models/text/transformer.py; texts are bytes, 256 of them (there 64 of
32,000 pieces of words, of lower-case letters and no punctuation), and padding is 0 (there the end of a text again).

  jaxmed train experiments/siglip.py --data CORPUS --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/siglip.py:laptop --data corpus --out RUN

CORPUS has a column `text`. Published: no number was found in these files; SigLIP 2's of this size, on ImageNet-1k
without its labels, is 78.2 % (README_siglip2.md). Not run here at full size. `laptop`: patches of the demo corpus and
the sentences that say where they lie, on 2 CPU cores, with CLIP's tower of texts: with SigLIP's the loss was still that
of constant vectors, 4.45, after 120 steps (towers of two blocks, one seed), with CLIP's it was 3.85.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'siglip',
        'model': 'vit_base/16',
        'image_size': 224,
        'batch_size': 32768,
        'steps': 274_658,
        'learning_rate': 1e-3,
        'encoder': {'class_token': False, 'kernel_init': 'xavier_qkv'},
        'objective': {'out_dim': 768, 'temperature': 0.1, 'bias': -10.0, 'max_scale': 0.0, 'feature': 'mean'},
        'towers': {'text': {'model': 'text_siglip_base'}},
        'optimizer': {'b1': 0.9, 'b2': 0.95, 'weight_decay': 0.1, 'warmup_steps': 8239, 'clip': 1.0},
        'augment': {'scale': (1.0, 1.0), 'flip': (0.0,)},
    },
    'laptop': {
        'method': 'siglip',
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
