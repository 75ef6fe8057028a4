"""Alice: a Swin encoder on CT, by crops of the same anatomy in two people (Jiang et al. 2023, arXiv 2302.05615).

Reproduces alibaba-damo-academy/alice, main-DDP.py, engine_pretrain.py and loss.py: crops of 64^3, 12 of 16 columns
hidden, 512 prototypes, a teacher of 0.996 to 1 and a temperature of 0.008 to 0.01, 1000 epochs over 2000 volumes of
FLARE 2022, AdamW with a decay of 0.04 to 0.4. Differs: see the method's docstring; Swin UNETR's encoder, as wide and
deep, in place of nnFormer; the rate rises to the published end of its course, 1e-4, and falls (there its peak is
5e-5 * 64 / 256, and it rises to the end); windows of -125 to 225 HU become -1 to 1, there 0 to 1.

  jaxmed prepare SCANS --out ct --volumes whole --spacing 2
  jaxmed train experiments/alice.py --data ct --out RUN towers.matcher.init=OTHER_RUN
  jaxmed train experiments/alice.py:laptop --data corpus --out RUN        # corpus of jaxmed prepare demo

Without `towers.matcher` the teacher finds matches itself. A matcher with patches of 8 voxels places them finer.
Published: 2.11 (FLARE 2022) and 1.77 (BTCV) points of Dice over the next best pretraining (abstract). Not run here at
full size. `laptop`: slices of the demo corpus on 2 CPU cores.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'alice',
        'model': 'swin_unetr_48',
        'image_size': 128,
        'batch_size': 8,
        'epochs': 1000.0,
        'learning_rate': 1e-4,
        'encoder': {'drop_path': 0.2},
        'objective': {'crop_size': (64,), 'reconstruct_weight': 2.5},
        'optimizer': {'weight_decay': 0.04, 'final_weight_decay': 0.4, 'clip': 3.0, 'clip_scope': 'tensor',
                      'warmup_epochs': 50.0},
        'loader': {'normalize': 'window:-125:225'},
    },
    'laptop': {
        'method': 'alice',
        'model': 'channel_vit_micro/8',
        'image_size': 48,
        'batch_size': 16,
        'steps': 300,
        'learning_rate': 5e-4,
        'eval_every': 100,
        'objective': {'out_dim': 256, 'hidden_dim': 256, 'bottleneck_dim': 64, 'decoder_dim': 96, 'decoder_heads': 3,
                      'casa_heads': 2, 'casa_hidden': 256, 'reconstruct_weight': 1.0},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
