"""Masked autoencoding of a small ChannelViT on the demo corpus, with hierarchical channel sampling.

Not a published recipe: the method of He et al. 2022 (norm-pixel loss, random masks) on the channel tokens of ChannelViT
(Bao et al. 2024), at a size and length that two CPU cores finish in about three minutes. What differs from the papers:
half of the tokens are hidden instead of 0.75 (a 48 x 48 image has nine a channel), crops cover at least 0.6 of it, and
channels that the sampling leaves out are predicted from the others (as CA-MAE and ChA-MAEViT do) instead of dropped.

  jaxmed prepare demo --out corpus
  jaxmed train experiments/demo.py --data corpus --out run
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """What differs from the defaults."""
  return ConfigDict({
      'method': 'mae',
      'model': 'channel_vit_micro/16',
      'image_size': 48,
      'steps': 1600,
      'batch_size': 32,
      'learning_rate': 1e-3,
      'eval_every': 400,
      'log_every': 20,
      'objective': {'mask_ratio': 0.5, 'unsampled': 'predict'},
      'augment': {'channel_sampling': 'hcs', 'scale': (0.6, 1.0)},
      'loader': {'label': 'region'},  # for the kNN in the progress line only
  })
