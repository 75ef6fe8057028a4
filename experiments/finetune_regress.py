"""Fine-tuning a ViT-B for a number, such as an age, by MAE's end-to-end recipe (He et al. 2022, arXiv 2111.06377).

Reproduces facebookresearch/mae, FINETUNE.md, as far as it is about optimization: AdamW, 5e-4 * B / 256 at a batch of
1024, decay 0.05, layer decay 0.65, drop path 0.1, 100 epochs with a rise over 5, cosine to 1e-6, mean of the patches.
Differs: the absolute error of a standardised number for the cross-entropy of classes; no RandAugment, mixup, CutMix or
erasing; the encoder's norm comes before the mean, not a new one after it. A run of MAE has a fixed table of positions,
which there is trained on and here stays: the encoder is that of `init`.

  jaxmed train experiments/finetune_regress.py --data CORPUS --out TUNED init=RUN loader.label=age
  jaxmed train experiments/finetune_regress.py:laptop --data CORPUS --out RUN loader.label=age

`jaxmed finetune RUN --task regress --label age` takes the model from a run. Published, of classes: 83.6 % on ImageNet
(FINETUNE.md: 83.57, deviation 0.08 over 4 runs); of a number nothing. 32 V100 there. Not run here at full size.
`laptop`: a small ViT on 2 CPU cores, from fresh weights.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'regress',
        'model': 'vit_base/16',
        'image_size': 224,
        'batch_size': 1024,
        'epochs': 100.0,
        'learning_rate': 2e-3,
        'evaluators': 'loss,head',
        'encoder': {'drop_path': 0.1, 'patch_init': 'torch'},
        'optimizer': {'weight_decay': 0.05, 'layer_decay': 0.65, 'warmup_epochs': 5.0, 'final_learning_rate': 1e-6},
        'augment': {'scale': (0.08, 1.0)},
        'loader': {'label': 'label'},
    },
    'laptop': {
        'method': 'regress',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 400,
        'learning_rate': 1e-3,
        'eval_every': 100,
        'evaluators': 'loss,head',
        'encoder': {'drop_path': 0.0},
        'augment': {'scale': (0.8, 1.0)},
        'loader': {'label': 'label'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
