"""DINO on ChannelViT-S/16 with hierarchical channel sampling: every view its own channels (after arXiv 2309.16108).

The code of Bao et al. trains ChannelViT by DINO (insitro/ChannelViT, channelvit/config/meta_arch/dino.yaml,
main_dino.yaml: 100 epochs, the boosted DINO with length-1 prototypes), but its channel sampling says that it does not
work with DINO. It does here, because sampling and teaching are apart: the teacher sees all channels of an image, each
student view draws its own subset (augment.channel_views 'each', teacher_channels 'all'), and a missing channel is a
mask on tokens, so that subsets of any size lie in one batch. The student then has to tell from a few channels what the
teacher tells from all of them, which is DINO's local-to-global task along channels. Differs from the file: this
sampling, and the batch of 1024 with its rate, which it leaves open; colours of microscopy are left alone, blur,
brightness and contrast are those of DINO; cells are flipped along both axes (there along one).

  jaxmed train experiments/channel_vit_dino.py --data CELLS --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/channel_vit_dino.py:laptop --data corpus --out RUN

Published: nothing with channel sampling. Without it CHAMMI-75 trains this model by DINO at 5e-5. Not run here at full
size. `laptop`: the demo corpus on 2 CPU cores, 4 local views.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'dino',
        'model': 'channel_vit_small/16',
        'image_size': 224,
        'batch_size': 1024,
        'epochs': 100.0,
        'learning_rate': 5e-4 * 1024 / 256,
        'encoder': {'drop_path': 0.1, 'pos_interpolation': 'offset'},
        'objective': {'out_dim': 65536, 'hidden_dim': 2048, 'bottleneck_dim': 256, 'norm_last_layer': True,
                      'start_temperature': 0.04, 'teacher_temperature': 0.07, 'temperature_epochs': 30.0,
                      'freeze_epochs': 1.0, 'start_momentum': 0.996},
        'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.04, 'final_weight_decay': 0.4, 'warmup_epochs': 10.0,
                      'clip': 3.0, 'clip_scope': 'tensor', 'final_learning_rate': 1e-6},
        'augment': {'views': 2, 'local_views': 8, 'local_size': 96, 'scale': (0.4, 1.0), 'local_scale': (0.05, 0.4),
                    'channel_sampling': 'hcs', 'channel_views': 'each', 'teacher_channels': 'all',
                    'flip': (0.5, 0.5), 'jitter_probability': (0.8,), 'brightness': 0.8, 'contrast': 0.4, 'color': (),
                    'grayscale': (0.0,), 'blur': 2.0, 'blur_probability': (1.0, 0.1, 0.5)},
    },
    'laptop': {
        'method': 'dino',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 600,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'encoder': {'drop_path': 0.0},
        'objective': {'out_dim': 1024, 'hidden_dim': 512, 'bottleneck_dim': 128, 'start_momentum': 0.99},
        'optimizer': {'final_weight_decay': 0.1},
        'augment': {'views': 2, 'local_views': 4, 'local_size': 32, 'scale': (0.4, 1.0), 'local_scale': (0.1, 0.4),
                    'channel_sampling': 'hcs', 'channel_views': 'each', 'teacher_channels': 'all',
                    'jitter_probability': (0.8,), 'brightness': 0.2, 'contrast': 0.2,
                    'color': (0.1, 0.05), 'grayscale': (0.0,)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
