"""What `tools/curation_study.py` trains: MoCo v3 of a small ChannelViT, on a whole corpus and without near-duplicates.

Not a published recipe. Wolf et al. 2024 (arXiv 2410.14524, "Less is More") find that contrastive pretraining on CT
improves where near-duplicates by difference hash (at most 6 of 64 bits) are left out. The question here is theirs, the
full set against the reduced one at the same number of steps and of epochs, for one small method, minutes on two CPU
cores, on images that come inside packages.

  jaxmed prepare demo --out corpus
  python tools/curation_study.py --data corpus --out runs/curation
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """What differs from the defaults."""
  return ConfigDict({
      'method': 'mocov3',
      'model': 'channel_vit_micro/16',
      'image_size': 48,
      'steps': 800,
      'batch_size': 32,
      'learning_rate': 5e-4,
      'objective': {'hidden_dim': 512, 'out_dim': 128},
      'augment': {'views': 2, 'scale': (0.3, 1.0), 'channel_sampling': 'hcs', 'jitter_probability': (0.8,),
                  'brightness': 0.2, 'contrast': 0.2, 'color': (0.1, 0.05), 'grayscale': (0.0,)},
      'loader': {'label': 'region'},  # to judge by; training does not see it
  })
