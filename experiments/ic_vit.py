"""IC-ViT: DINO on single channels, then fine-tuning on all of them (Lian et al. 2025, arXiv 2503.09826).

Reproduces shermanlian/IC-ViT. `published` is the pretraining of its README on So2Sat (ICVIT-pretrain/train_dino.py):
one random channel of each image in both views, batch 2 x 512, 201 epochs, no local views, teacher temperature 0.04,
rate 5e-4 * B / 256, ViT-S of 32 pixels at patch 8. `finetune` is its fine-tuning on JUMP-CP (icvit/config): the same
weights as ChannelViT-S/16 with fresh channel embeddings, hierarchical channel sampling, batch 2 x 32, 100 epochs, rate
5e-4 * B / 256; its pretraining is `published` with model=bag_small/16 image_size=224 augment.local_views=8
augment.local_size=96 on that corpus. Differs: jitter has no saturation and hue, which a single channel lacks; images
are standardised by the corpus, there not at all (its Normalize is commented out), and brightness adds 0.4 deviations;
lengths of prototypes stay 1, as the option asks, which there has no effect (archs/hf_vit.py:DINOHead sets it on the
module); views of JUMP-CP are those of experiments/supervised.py.

  jaxmed train experiments/ic_vit.py --data SO2SAT --out PRETRAINED
  jaxmed train experiments/ic_vit.py:finetune --data JUMPCP --out RUN init=PRETRAINED_ON_JUMPCP
  jaxmed prepare demo --out corpus && jaxmed train experiments/ic_vit.py:laptop --data corpus --out PRETRAINED
  jaxmed train experiments/ic_vit.py:laptop_finetune --data corpus --out RUN init=PRETRAINED

Published: 4 to 14 points above existing models on JUMP-CP, CHAMMI and So2Sat (abstract). 2 A100. Not run here at full
size. `laptop` and `laptop_finetune`: the demo corpus on 2 CPU cores.
"""

from ml_collections import ConfigDict

CHANNELS = {'channel_sampling': 'single', 'channel_views': 'shared', 'teacher_channels': 'same'}
VARIANTS = {
    'published': {
        'method': 'dino',
        'model': 'bag_small/8',
        'image_size': 32,
        'batch_size': 1024,
        'epochs': 201.0,
        'learning_rate': 5e-4 * 1024 / 256,
        'encoder': {'drop_path': 0.1, 'pos_interpolation': 'offset'},
        'objective': {'out_dim': 65536, 'hidden_dim': 2048, 'bottleneck_dim': 256, 'norm_last_layer': True,
                      'start_temperature': 0.04, 'teacher_temperature': 0.04, 'temperature_epochs': 0.0,
                      'freeze_epochs': 1.0, 'start_momentum': 0.996},
        'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.04, 'final_weight_decay': 0.4, 'warmup_epochs': 10.0,
                      'clip': 3.0, 'clip_scope': 'tensor', 'final_learning_rate': 1e-6},
        'augment': CHANNELS | {
            'views': 2, 'local_views': 0, 'scale': (0.4, 1.0), 'flip': (0.0, 0.5), 'jitter_probability': (0.8,),
            'brightness': 0.4, 'contrast': 0.4, 'color': (), 'grayscale': (0.0,), 'blur': 2.0,
            'blur_probability': (1.0, 0.1, 0.5)},
    },
    'finetune': {
        'method': 'supervised',
        'model': 'channel_vit_small/16',
        'image_size': 224,
        'batch_size': 64,
        'epochs': 100.0,
        'learning_rate': 5e-4 * 64 / 256,
        'encoder': {'drop_path': 0.1},
        'objective': {'label_smoothing': 0.0},
        'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.04, 'final_weight_decay': 0.4, 'warmup_epochs': 10.0,
                      'final_learning_rate': 1e-6},
        'augment': {'channel_sampling': 'hcs', 'scale': (1.0, 1.0), 'ratio': (1.0, 1.0), 'flip': (0.5, 0.5),
                    'rotate90': (0.5,), 'blur': 1.0, 'blur_probability': (0.5,)},
        'loader': {'label': 'label', 'load_size': (224, 224), 'fit': 'crop'},
    },
    'laptop': {
        'method': 'dino',
        'model': 'bag_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 600,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'encoder': {'drop_path': 0.0},
        'objective': {'out_dim': 1024, 'hidden_dim': 512, 'bottleneck_dim': 128, 'start_momentum': 0.99},
        'optimizer': {'final_weight_decay': 0.1},
        'augment': CHANNELS | {
            'views': 2, 'local_views': 0, 'scale': (0.4, 1.0), 'jitter_probability': (0.8,), 'brightness': 0.2,
            'contrast': 0.2, 'color': (), 'grayscale': (0.0,)},
        'loader': {'label': 'region'},
    },
    'laptop_finetune': {
        'method': 'supervised',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 400,
        'learning_rate': 5e-4,
        'eval_every': 100,
        'encoder': {'drop_path': 0.0},
        'augment': {'scale': (0.8, 1.0), 'flip': (0.0, 0.0), 'brightness': 0.1, 'contrast': 0.1},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
