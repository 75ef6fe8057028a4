"""CA-MAE: masked autoencoding with a decoder for each channel (Kraus et al. 2024, arXiv 2404.10242).

Follows recursionpharma/maes_microscopy: a token a patch and channel of 256 x 256 images that are standardised one by
one, 75 % of them hidden, fixed positions, LayerScale from 1e-4, drop path 0.1; decoders of width 256 with 2 blocks
and 16 heads for each channel after a common cross-attention (mae_modules.py:CAMAEDecoder); 0.99 of the pixels' error
and 0.01 of the spectra's (loss.py, config.yaml), without normalised patches; decay 0.05, b2 0.95, warm-up over a
tenth of the run. Differs: the repository has no training loop, so that batch, length and the form of the rate are
this recipe's; AdamW at MAE's rate instead of Lion at 1e-4; the encoder's blocks are timm's Block, of which all
transformers here are made, there its ParallelScalingBlock (attention and MLP side by side under one norm, LayerScale
and draw of drop path) with normalised queries and keys (vit.py:236-251); the encoder has channel embeddings, which
there only the decoder has; positions have the width's features first, there the height's (vit.py:50-58), the same but
for the order of features; a channel's variance is taken as it is, where InstanceNorm2d adds 1e-5 to that of x / 255
(mae_modules.py:19-28), which tells where a channel varies by a few grey values only; mask token and embeddings of the
decoder begin at random (there at 0). Phenom-Beta (phenombeta.yaml, global_pool: avg) has no norm between encoder and
decoder, and decoders of 4 blocks. A decoder runs for every name of the vocabulary: objective.decoder_channels=together
is cheaper where images have few of many channels.

  jaxmed train experiments/ca_mae.py --data CELLS --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/ca_mae.py:laptop --data corpus --out RUN

Published: it transfers from RPI-93M to the other channels of JUMP-CP (section 5); no figure of a public corpus to
compare with. Not run here at full size. `laptop`: the demo corpus on 2 CPU cores, half of the tokens hidden.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'mae',
        'model': 'channel_vit_base/16',
        'image_size': 256,
        'batch_size': 1024,
        'epochs': 100.0,
        'learning_rate': 1.5e-4 * 1024 / 256,
        'encoder': {'pos': 'sincos', 'pos_interpolation': 'antialias', 'qkv_bias': False, 'layer_scale': 1e-4,
                    'drop_path': 0.1, 'kernel_init': 'trunc_normal', 'patch_init': 'torch', 'token_std': 1e-6},
        'objective': {'mask_ratio': 0.75, 'norm_pixels': False, 'fourier': 0.01, 'decoder_channels': 'separate',
                      'decoder_dim': 256, 'decoder_depth': 2, 'decoder_heads': 16},
        'optimizer': {'b1': 0.9, 'b2': 0.95, 'weight_decay': 0.05, 'warmup_epochs': 10.0},
        'augment': {'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'flip': (0.5, 0.5)},
        'loader': {'normalize': 'image', 'load_size': (256, 256), 'fit': 'crop'},
    },
    'laptop': {
        'method': 'mae',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 800,
        'learning_rate': 1e-3,
        'eval_every': 200,
        'objective': {'mask_ratio': 0.5, 'fourier': 0.01, 'decoder_channels': 'separate', 'decoder_dim': 64,
                      'decoder_depth': 1, 'decoder_heads': 4},
        'augment': {'scale': (0.6, 1.0)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
