"""Bag of channels: DINO on one-channel images (De Lorenci et al. 2025; CHAMMI-75's MorphEm, arXiv 2512.20833).

Reproduces CaicedoLab/CHAMMI-75, models/dinov1/Readme.md and main_dino.py: ViT-S/16 by DINO with the defaults of
facebookresearch/dino (teacher temperature 0.04, decay 0.04 to 0.4, clip 3 tensor by tensor, 8 local views), rate 5e-5
* B / 256, batch 2 x 224, 100 epochs, images normalised one by one, flips and crops alone. An image shows one channel
at a time, the same in all of its views; a trained encoder gives the features of all channels one after the other
(encoder.pooling=concat). Differs: there a channel is a record of its own, so that an epoch has more images; their
saturated pixels become noise, and windows around cells are cut out first; half precision. De Lorenci et al. train
ViT-L/16 by DINOv2 in the same way (facebookresearch/dinov2, docs/README_CHANNEL_ADAPTIVE_DINO.md), whose settings are
not published: experiments/dinov2.py with model=bag_large/16 and this recipe's augment.channel_* options.

  jaxmed train experiments/bag_of_channels.py --data CELLS --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/bag_of_channels.py:laptop --data corpus --out RUN

Published: MorphEm is best on six of seven benchmarks; De Lorenci et al. have 79.4 % (WTC), 86.6 % (HPA) and 92.6 %
(CP) by kNN on task 1 of CHAMMI, about 2 days on 32 A100. 2 GPUs here. Not run here at full size. `laptop`: the demo
corpus on 2 CPU cores, 4 local views.
"""

from ml_collections import ConfigDict

CHANNELS = {'channel_sampling': 'single', 'channel_views': 'shared', 'teacher_channels': 'same'}
VARIANTS = {
    'published': {
        'method': 'dino',
        'model': 'bag_small/16',
        'image_size': 224,
        'batch_size': 448,
        'epochs': 100.0,
        'learning_rate': 5e-5 * 448 / 256,
        'encoder': {'drop_path': 0.1, 'pos_interpolation': 'offset', 'pooling': 'concat'},
        'objective': {'out_dim': 65536, 'hidden_dim': 2048, 'bottleneck_dim': 256, 'norm_last_layer': True,
                      'start_temperature': 0.04, 'teacher_temperature': 0.04, 'temperature_epochs': 0.0,
                      'freeze_epochs': 1.0, 'start_momentum': 0.996},
        'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.04, 'final_weight_decay': 0.4, 'warmup_epochs': 10.0,
                      'clip': 3.0, 'clip_scope': 'tensor', 'final_learning_rate': 1e-6},
        'augment': CHANNELS | {
            'views': 2, 'local_views': 8, 'local_size': 96, 'scale': (0.4, 1.0), 'local_scale': (0.05, 0.4),
            'flip': (0.5, 0.5), 'jitter_probability': (0.0,), 'color': (), 'grayscale': (0.0,)},
        'loader': {'normalize': 'image'},
    },
    'laptop': {
        'method': 'dino',
        'model': 'bag_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 600,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'encoder': {'drop_path': 0.0, 'pooling': 'concat'},
        'objective': {'out_dim': 1024, 'hidden_dim': 512, 'bottleneck_dim': 128, 'start_momentum': 0.99},
        'optimizer': {'final_weight_decay': 0.1},
        'augment': CHANNELS | {
            'views': 2, 'local_views': 4, 'local_size': 32, 'scale': (0.4, 1.0), 'local_scale': (0.1, 0.4),
            'jitter_probability': (0.8,), 'brightness': 0.2, 'contrast': 0.2, 'color': (), 'grayscale': (0.0,)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
