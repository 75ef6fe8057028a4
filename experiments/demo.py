"""Masked autoencoding of a small ChannelViT on the demo corpus, with hierarchical channel sampling.

Not a published recipe: the method of He et al. 2022 (mask 0.75, norm-pixel loss) on the channel tokens of
ChannelViT (Bao et al. 2024), at a size and length that two CPU cores finish in about three minutes.

  jaxmed prepare demo --out corpus
  jaxmed train experiments/demo.py --data corpus --out run
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """What differs from the defaults."""
  return ConfigDict({
      'method': 'mae',
      'model': 'channel_vit_micro/8',
      'image_size': 48,
      'steps': 300,
      'batch_size': 64,
      'learning_rate': 1e-3,
      'objective': {'decoder_dim': 128, 'decoder_depth': 2, 'decoder_heads': 4},
      'augment': {'channel_sampling': 'hcs'},
      'loader': {'label': 'region'},  # for the kNN in the progress line only
  })
