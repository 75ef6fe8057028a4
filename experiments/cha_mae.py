"""ChA-MAEViT-S: masked autoencoding of channels and patches, with classes (Pham et al. 2025, arXiv 2503.19331).

Reproduces chaudatascience/cha_mae_vit, train_scripts.sh with the defaults of configs/: dynamic channel-patch masking,
memory tokens (registers) that go on into the decoder, a decoder of one block that shares the encoder's positions and
orthogonal channel embeddings, 0.99 of the reconstruction (0.01 of it of spectra) and 0.01 of a loss of classes, the
diversity losses of DiChaViT, LayerScale of 1, rate 4e-4 to 0, 100 epochs. `published` is JUMP-CP (8 channels, batch 2 x
32, clip 3), `chammi` CHAMMI with proxies for classes (batch 80, clip 1), `so2sat` So2Sat with both ways of masking at
once (batch 128, clip 1). Differs: classes are read off the class token, there with attention over the patches added to
it or as a gate; spectra are those of patches (see `spectral_error`); projections of the decoder have a bias and begin
as MAE's; which channels are hidden is drawn for each image, and the channel loss is over all that a batch has (there
over those shown); memory tokens have no second position in the decoder; weights alone decay, there all parameters;
views of JUMP-CP are those of experiments/supervised.py. The paper (appendix E) has a last rate of 1e-6 and a ratio of
0.75 for alternate masking; the runs behind its code's figures (training_logs/) have those above.

  jaxmed train experiments/cha_mae.py --data JUMPCP --out RUN
  jaxmed train experiments/cha_mae.py:chammi --data CHAMMI --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/cha_mae.py:laptop --data corpus --out RUN

Published: 90.69 % on JUMP-CP, 74.60 on CHAMMI, 67.02 % on So2Sat (training_logs/). 2 GPUs, and 1 for the others. Not
run here at full size. `laptop`: the demo corpus on 2 CPU cores, half of the nine tokens of a channel hidden.
"""

from ml_collections import ConfigDict

MASKING = {'mask_channels': 'dynamic', 'patches_only': 0.5, 'channels_only': 0.5}
DECODER = {'decoder_depth': 1, 'decoder_heads': 16, 'decoder_registers': True, 'decoder_shares': True}
JUMPCP = {
    'method': 'mae',
    'model': 'channel_vit_small/16',
    'image_size': 224,
    'batch_size': 64,
    'epochs': 100.0,
    'learning_rate': 4e-4,
    'encoder': {'depth': 11, 'num_registers': 4, 'layer_scale': 1.0, 'channel_init': 'orthogonal', 'pos': 'learned',
                'kernel_init': 'trunc_normal', 'patch_init': 'torch'},
    'objective': MASKING | DECODER | {
        'mask_ratio': 0.25, 'norm_pixels': True, 'fourier': 0.01, 'class_weight': 0.01, 'class_temperature': 5.0,
        'feature': 'cls', 'channel_diversity': 1e-3, 'token_diversity': 1e-6, 'diversity_temperature': 5.0,
        'same_channel': 1.0, 'other_channels': 4.0, 'diversity_classes': 'all'},
    'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.04, 'warmup_epochs': 10.0, 'clip': 3.0},
    'augment': {'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'flip': (0.5, 0.5), 'rotate90': (0.5,), 'blur': 1.0,
                'blur_probability': (0.5,)},
    'loader': {'label': 'label', 'load_size': (224, 224), 'fit': 'crop'},
}
LIGHT = JUMPCP['optimizer'] | {'weight_decay': 5e-5, 'warmup_epochs': 5.0, 'clip': 1.0}

VARIANTS = {
    'published': JUMPCP,
    'chammi': JUMPCP | {
        'batch_size': 80,
        'objective': JUMPCP['objective'] | {
            'mask_ratio': 0.75, 'class_loss': 'proxy', 'class_temperature': 0.11, 'channel_diversity': 1e-4,
            'token_diversity': 1e-3, 'diversity_temperature': 0.1, 'same_channel': 0.5, 'other_channels': 1.0},
        'optimizer': LIGHT,
        'augment': {'scale': (0.8, 1.0), 'ratio': (0.9, 1.1), 'flip': (0.0, 0.5)},
        'loader': {'label': 'label'},
    },
    'so2sat': JUMPCP | {
        'model': 'channel_vit_small/8',
        'image_size': 32,
        'batch_size': 128,
        'encoder': JUMPCP['encoder'] | {'num_registers': 8},
        'objective': JUMPCP['objective'] | {
            'mask_ratio': 0.2, 'patches_only': 0.0, 'channels_only': 0.0, 'class_temperature': 10.0,
            'channel_diversity': 1e-4, 'token_diversity': 1e-5, 'diversity_temperature': 10.0},
        'optimizer': LIGHT,
        'augment': {'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'flip': (0.5, 0.5), 'rotate90': (0.75,)},
        'loader': {'label': 'label'},
    },
    'laptop': {
        'method': 'mae',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 800,
        'learning_rate': 1e-3,
        'eval_every': 200,
        'encoder': {'num_registers': 4, 'channel_init': 'orthogonal'},
        'objective': MASKING | {
            'mask_ratio': 0.5, 'decoder_depth': 1, 'decoder_registers': True, 'decoder_shares': True, 'fourier': 0.01,
            'class_weight': 0.01, 'feature': 'cls', 'channel_diversity': 1e-4, 'token_diversity': 1e-5},
        'augment': {'scale': (0.6, 1.0), 'flip': (0.0, 0.0)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
