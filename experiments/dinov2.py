"""DINOv2: ViT-L/16 on ImageNet-1k from scratch, and the ViT-g/14 of the paper (Oquab et al. 2024, arXiv 2304.07193).

Reproduces facebookresearch/dinov2, dinov2/configs. `published` is train/vitl16_short.yaml with ssl_default_config.yaml:
batch 2048, 125,000 steps, rate 4e-3 * sqrt(B / 1024), layer decay 0.9, softmax centring, one head of 65536 prototypes.
`long` is train/vitg14.yaml for ImageNet-22k: 625,000 steps, Sinkhorn, two heads of 131072, at a batch of 3072 (12 on
each of 256 GPUs; the file leaves their number open, and 3072 gives the paper's rate of 3.5e-4). `high_res` is the
paper's last 10,000 steps at 518 pixels with all schedules compressed (appendix, from memory); no file of it is
published, and its rate, a tenth, and its local crops of 224 pixels are chosen here. Epochs of 1250 steps are turned
into epochs of the data set; `init` gives `high_res` heads and teacher too. Differs: masks are drawn over the global
batch (there a device's); blur is as their code has it, never in the first global view and 0.9 of the second (its p is
the probability of no blur; meant were 1 and 0.1), and what experiments/README.md says of colours.

  jaxmed train experiments/dinov2.py --data IMAGENET --out RUN
  jaxmed train experiments/dinov2.py:long --data IMAGENET22K --out RUN mesh.fsdp=8
  jaxmed train experiments/dinov2.py:high_res --data IMAGENET22K --out RUN2 init=RUN mesh.fsdp=8
  jaxmed prepare demo --out corpus && jaxmed train experiments/dinov2.py:laptop --data corpus --out RUN

Published: `published` 81.6 % kNN and 82.9 % linear top-1 on ImageNet-1k, about a day on 32 A100-80GB (README.md);
ViT-g/14 on LVD-142M, which is private, 83.5 % and 86.5 %. Not run here at full size. `laptop`: the demo corpus on 2 CPU
cores, 4 local views, small heads.
"""

from ml_collections import ConfigDict

EPOCH = 1250 * 2048 / 1_281_167  # an official epoch in epochs of ImageNet-1k
LONG_EPOCH = 1250 * 3072 / 14_197_122  # of ImageNet-22k

PUBLISHED = {
    'method': 'dinov2',
    'model': 'vit_large/16',
    'image_size': 224,
    'batch_size': 2048,
    'steps': 100 * 1250,
    'learning_rate': 4e-3 * (2048 / 1024) ** 0.5,
    'encoder': {'drop_path': 0.3, 'drop_path_law': 'exact', 'layer_scale': 1e-5,
                'pos_interpolation': 'offset', 'dtype': 'bfloat16'},
    'objective': {'centering': 'softmax', 'separate_head': False, 'out_dim': 65536, 'hidden_dim': 2048,
                  'bottleneck_dim': 256, 'start_temperature': 0.04, 'teacher_temperature': 0.07,
                  'temperature_epochs': 30 * EPOCH, 'freeze_epochs': EPOCH, 'start_momentum': 0.992,
                  'mask_probability': 0.5, 'mask_ratio': (0.1, 0.5), 'dino_weight': 1.0, 'ibot_weight': 1.0,
                  'koleo_weight': 0.1, 'koleo_group': 64},
    'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.04, 'final_weight_decay': 0.4, 'warmup_steps': 10 * 1250,
                  'clip': 3.0, 'clip_scope': 'module', 'final_learning_rate': 1e-6, 'layer_decay': 0.9,
                  'patch_embed_scale': 0.2},
    'augment': {'views': 2, 'local_views': 8, 'local_size': 96, 'scale': (0.32, 1.0),
                'local_scale': (0.05, 0.32), 'flip': (0.0, 0.5), 'jitter_probability': (0.8,),
                'brightness': 0.8, 'contrast': 0.4, 'color': (0.2, 0.1), 'grayscale': (0.2,), 'blur': 2.0,
                'blur_probability': (0.0, 0.9, 0.5), 'solarize': (0.0, 0.2, 0.0)},
}
LONG = PUBLISHED | {
    'model': 'vit_giant2/14',
    'batch_size': 3072,
    'steps': 500 * 1250,
    'learning_rate': 2e-4 * (3072 / 1024) ** 0.5,
    'encoder': PUBLISHED['encoder'] | {'drop_path': 0.4, 'remat': 'full'},
    'objective': PUBLISHED['objective'] | {
        'centering': 'sinkhorn', 'separate_head': True, 'out_dim': 131072, 'bottleneck_dim': 384,
        'patch_out_dim': 131072, 'patch_bottleneck_dim': 256, 'temperature_epochs': 30 * LONG_EPOCH,
        'freeze_epochs': LONG_EPOCH, 'start_momentum': 0.994, 'koleo_group': 12},
    'optimizer': PUBLISHED['optimizer'] | {'final_weight_decay': 0.2, 'warmup_steps': 80 * 1250, 'layer_decay': 1.0},
    'augment': PUBLISHED['augment'] | {'local_size': 98},
}

VARIANTS = {
    'published': PUBLISHED,
    'long': LONG,
    'high_res': LONG | {
        'init_parts': 'all',
        'image_size': 518,
        'steps': 10_000,
        'learning_rate': 0.1 * 2e-4 * (3072 / 1024) ** 0.5,
        'objective': LONG['objective'] | {'temperature_epochs': 30 / 500 * 10_000 * 3072 / 14_197_122,
                                          'freeze_epochs': 1 / 500 * 10_000 * 3072 / 14_197_122},
        'optimizer': LONG['optimizer'] | {'warmup_steps': 1600},
        'augment': LONG['augment'] | {'local_size': 224},
    },
    'laptop': {
        'method': 'dinov2',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 600,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'encoder': {'drop_path': 0.0, 'layer_scale': 1.0},
        'objective': {'out_dim': 1024, 'hidden_dim': 512, 'bottleneck_dim': 128, 'start_momentum': 0.99},
        'optimizer': {'final_weight_decay': 0.1, 'layer_decay': 1.0},
        'augment': {'views': 2, 'local_views': 4, 'local_size': 32, 'scale': (0.4, 1.0), 'local_scale': (0.1, 0.4),
                    'channel_sampling': 'hcs', 'jitter_probability': (0.8,), 'brightness': 0.2, 'contrast': 0.2,
                    'color': (0.1, 0.05), 'grayscale': (0.0,)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
