"""ConVIRT: a ResNet-50 and BERT on images and sentences of their reports (Zhang et al. 2020, arXiv 2010.00747).

No code of its authors is public (yuhaozhang/convirt holds lists of images alone): the constants are the paper's as
later work tells them, none of them read in code. Batches of 32, a rate of 1e-4, vectors of 512, a temperature of 0.1,
lambda of 0.75, one sentence a step, crops of 0.6 to 1. Differs: see the method's docstring; turns and shears of up to
20 degrees are turns here; the number of steps is not told, here 200,000.

  jaxmed train experiments/convirt.py --data CORPUS --out RUN loader.tokenizer=VOCAB
  jaxmed prepare demo --out corpus && jaxmed train experiments/convirt.py:laptop --data corpus --out RUN

CORPUS has a column `text`, VOCAB is a vocab.txt of BERT, cased. Published: no number was read. Not run here at full
size. `laptop`: patches of the demo corpus and sentences of where they lie, on 2 CPU cores, in bytes.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'convirt',
        'model': 'resnet50',
        'image_size': 224,
        'batch_size': 32,
        'steps': 200_000,
        'learning_rate': 1e-4,
        'objective': {'out_dim': 512, 'temperature': 0.1, 'weight': 0.75},
        'towers': {'text': {'model': 'bert_base_cased', 'options': {'pool': 'max'}}},
        'augment': {'scale': (0.6, 1.0), 'flip': (0.5,), 'rotate': 20.0, 'jitter_probability': (1.0,),
                    'brightness': 0.4, 'contrast': 0.4, 'blur': 3.0, 'blur_probability': (1.0,)},
        'loader': {'text_draw': 'sentence', 'text_length': 128},
    },
    'laptop': {
        'method': 'convirt',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 800,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'objective': {'out_dim': 128},
        'augment': {'scale': (0.9, 1.0), 'flip': (0.0,), 'channel_sampling': 'hcs'},
        'loader': {'label': 'region', 'text_length': 144},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
