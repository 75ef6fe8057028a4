"""Uni4Eye++: ViT-L/16 on images and volumes of the eye (Cai et al. 2022, arXiv 2203.04614, and TMI 2024).

Reproduces Davidczy/Uni4Eye_pp, main_pretrain_partial23D.py and engine_pretrain.py, with what is meant there: 224 x 224
images and 112 slices of volumes, patches of 16 and 16^3, half of them hidden with noise weighed by entropy
(train_one_epoch_partial_imgen), two decoders (train_one_epoch_2decoder), 200 epochs of AdamW. Differs: see the
method's docstring; images and volumes share a batch of 32 (there an epoch of each in turn, 64 images or 8
volumes on each device, whose number the files leave open); the rate is that of one device; targets are normalised by
patch (there an option that is off); volumes have at most 112 slices in windows (there resized).

  jaxmed train experiments/uni4eye.py --data SLICES --out RUN mesh.fsdp=8
  jaxmed prepare demo --out corpus && jaxmed train experiments/uni4eye.py:laptop --data corpus --out RUN

SLICES is what `jaxmed prepare` makes of volumes by default, with images beside them. Published: no number was found in
what was read. Not run here at full size. `laptop`: the demo corpus on 2 CPU cores, windows of 4 slices.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'uni4eye',
        'model': 'vit_large/16',
        'image_size': 224,
        'batch_size': 32,
        'epochs': 200.0,
        'learning_rate': 1e-3 * 64 / 256,
        'objective': {'mask_ratio': 0.5, 'guided': True, 'gradient_weight': 1.0, 'patch_slices': 16, 'inflated': False,
                      'decoder_dim': 512, 'decoder_depth': 8, 'decoder_heads': 16},
        'optimizer': {'b1': 0.9, 'b2': 0.95, 'weight_decay': 0.05, 'warmup_epochs': 40.0},
        'augment': {'scale': (0.2, 1.0), 'flip': (0.0, 0.0)},
        'loader': {'window': 112, 'window_group': 'path', 'window_order': 'id'},
    },
    'laptop': {
        'method': 'uni4eye',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 16,
        'steps': 400,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'objective': {'patch_slices': 2, 'inflated': True},
        'augment': {'scale': (0.4, 1.0)},
        'loader': {'label': 'region', 'window': 4},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
