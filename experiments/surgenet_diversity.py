"""SurgeNet's study of diversity: DINO on frames of one procedure, or of all (Jaspers et al. 2024, arXiv 2407.17904).

The setting is that of experiments/surgenet.py (CAFormer-S18, 50 epochs); what differs between the variants are the
frames alone. `published` takes the frames of all procedures and public videos as they are. `procedure` takes those of
one: name its sources, as the column `source` of the manifest does. Both make as many passes over their own frames, as
the paper's do; for the same number of steps instead give steps=N. No options of this study's pretraining are public:
constants are those of experiments/surgenet.py. Two mixtures that the paper does not have: `balanced` evens the sources
out (shares in proportion to the square root of the frames), `focused` draws from all and, in the last fifth, mostly
from one procedure (give loader.weights with its name). Differs: see experiments/surgenet.py.

  jaxmed train experiments/surgenet_diversity.py --data FRAMES --out all init=FILE
  jaxmed train experiments/surgenet_diversity.py:procedure --data FRAMES --out one init=FILE loader.sources=RARP
  jaxmed train experiments/surgenet_diversity.py:balanced --data FRAMES --out even init=FILE
  jaxmed train experiments/surgenet_diversity.py:focused --data FRAMES --out late init=FILE \
      loader.weights='0:*=1;0.8:RARP=6,*=1'
  jaxmed prepare demo --out corpus && jaxmed train experiments/surgenet_diversity.py:laptop --data corpus --out RUN

Published (abstract; frames of 13 procedures, 2.6 million): against ImageNet, pretraining on the procedure alone gives
13.8, 9.5 and 36.8 % on three tasks, and the heterogeneous frames a further 5.0, 5.2 and 2.5 %. Not run here at full
size. `laptop` (all sources of the demo corpus, evened out) and `laptop_one` (fundus alone) show on 2 CPU cores that
both run.
"""

from ml_collections import ConfigDict

PUBLISHED = {
    'method': 'dino',
    'model': 'caformer_s18',
    'image_size': 224,
    'batch_size': 4 * 136,
    'epochs': 50.0,
    'learning_rate': 5e-4 * 4 * 136 / 256,
    'encoder': {'drop_path': 0.1},
    'objective': {'out_dim': 65536, 'hidden_dim': 2048, 'bottleneck_dim': 256, 'norm_last_layer': True,
                  'start_temperature': 0.04, 'teacher_temperature': 0.04, 'temperature_epochs': 0.0,
                  'freeze_epochs': 1.0, 'start_momentum': 0.996},
    'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.04, 'final_weight_decay': 0.4, 'warmup_epochs': 10.0,
                  'clip': 3.0, 'clip_scope': 'tensor', 'final_learning_rate': 1e-6},
    'augment': {'views': 2, 'local_views': 8, 'local_size': 96, 'scale': (0.4, 1.0), 'local_scale': (0.05, 0.4),
                'flip': (0.0, 0.5), 'jitter_probability': (0.8,), 'brightness': 0.8, 'contrast': 0.4,
                'color': (0.2, 0.1), 'grayscale': (0.2,), 'blur': 2.0, 'blur_probability': (1.0, 0.1, 0.5),
                'solarize': (0.0, 0.2, 0.0)},
}

LAPTOP = {
    'method': 'dino',
    'model': 'caformer_micro',
    'image_size': 48,
    'batch_size': 16,
    'steps': 400,
    'learning_rate': 5e-4,
    'eval_every': 200,
    'encoder': {'drop_path': 0.0},
    'objective': {'out_dim': 1024, 'hidden_dim': 512, 'bottleneck_dim': 128, 'start_momentum': 0.99},
    'optimizer': {'final_weight_decay': 0.1},
    'augment': {'views': 2, 'local_views': 2, 'local_size': 32, 'scale': (0.4, 1.0), 'local_scale': (0.1, 0.4),
                'jitter_probability': (0.8,), 'brightness': 0.2, 'contrast': 0.2, 'color': (0.1, 0.05),
                'grayscale': (0.0,)},
}

VARIANTS = {
    'published': PUBLISHED,
    'procedure': PUBLISHED,
    'balanced': PUBLISHED | {'loader': {'balance': 'source', 'alpha': 0.5}},
    'focused': PUBLISHED | {'loader': {'balance': 'source', 'schedule': 'step'}},
    'laptop': LAPTOP | {'loader': {'balance': 'source', 'alpha': 0.5}},
    'laptop_one': LAPTOP | {'loader': {'sources': 'fundus'}},
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
