"""DINOv3: ViT-L/16 on ImageNet-1k, and the three stages of the 7B model (Simeoni et al. 2025, arXiv 2508.10104).

Reproduces facebookresearch/dinov3, dinov3/configs/train. `published` is vitl_im1k_lin834.yaml: batch 2048, 125,000
steps, its rate 1e-3 times 4 * sqrt(B / 1024) (configs/config.py), Sinkhorn, two heads of 65536, rotary positions
without registers. `7b` is dinov3_vit7b16_pretrain.yaml: a million steps of 4096 at a constant 5e-5 * 8, decay 0.04, EMA
0.994. `gram` is dinov3_vit7b16_gram_anchor.yaml: 200,000 steps with the Gram loss against 512-pixel crops of a teacher
that is renewed three times, its weight and that of local crops ramped over the first 1000. `high_res` is
dinov3_vit7b16_high_res_adapt.yaml: 30,000 steps on its mixture of five sizes; `init` gives both stages heads and
teacher too, and the latter its student from the teacher, as there. Epochs of 1000 or 1250 steps are turned into epochs
of the data set: of ImageNet-1k for `published`, of 1,689 million images for the others (scale temperature_epochs and
freeze_epochs on another one). Differs: stages start with new moments, hence `gram` with a warm-up of 1000 steps (there
at once with its full rate), and with the Gram teacher being the teacher they start from; the warm-up of `high_res` is
linear (there a cosine), and of its local views of 168 pixels, of which whole patches see 160, are made those; float8
products and bias-free keys do not apply; blur as in dinov2.py, and what experiments/README.md says of colours.

  jaxmed train experiments/dinov3.py --data IMAGENET --out RUN
  jaxmed train experiments/dinov3.py:7b --data IMAGES --out RUN mesh.fsdp=256
  jaxmed train experiments/dinov3.py:gram --data IMAGES --out RUN2 init=RUN mesh.fsdp=256
  jaxmed train experiments/dinov3.py:high_res --data IMAGES --out RUN3 init=RUN2 mesh.fsdp=256
  jaxmed prepare demo --out corpus && jaxmed train experiments/dinov3.py:laptop --data corpus --out RUN

Published: `published` 82.0 % kNN and 83.5 % linear top-1 on ImageNet-1k, about 14 hours on 32 H100-80GB; 7B on 256
GPUs, its data are private (README.md). Not run here at full size. `laptop`: the demo corpus on 2 CPU cores, Gram loss
from step 300 on.
"""

from ml_collections import ConfigDict

EPOCH = 1250 * 2048 / 1_281_167  # an official epoch in epochs of ImageNet-1k
BIG_EPOCH = 1000 * 4096 / 1_689_000_000  # of 1,689 million images

PUBLISHED = {
    'method': 'dinov3',
    'model': 'vit_large/16',
    'image_size': 224,
    'batch_size': 2048,
    'steps': 100 * 1250,
    'learning_rate': 1e-3 * 4 * (2048 / 1024) ** 0.5,
    'encoder': {'pos': 'rope', 'rope_base': 100.0, 'num_registers': 0, 'rope_rescale': 0.0, 'local_norm': False,
                'drop_path': 0.3, 'drop_path_law': 'exact', 'layer_scale': 1e-5, 'dtype': 'bfloat16'},
    'objective': {'centering': 'sinkhorn', 'separate_head': True, 'out_dim': 65536, 'hidden_dim': 2048,
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
BIG = PUBLISHED | {
    'model': 'vit_giant2/16',  # with the fields of the 7B model
    'image_size': 256,
    'batch_size': 4096,
    'steps': 1_000_000,
    'learning_rate': 5e-5 * 4 * (4096 / 1024) ** 0.5,
    'encoder': {'embed_dim': 4096, 'depth': 40, 'num_heads': 32, 'mlp': 'swiglu', 'mlp_ratio': 2.0, 'qkv_bias': False,
                'pos': 'rope', 'rope_base': 100.0, 'rope_rescale': 2.0, 'num_registers': 4, 'local_norm': True,
                'drop_path': 0.4, 'drop_path_law': 'exact', 'layer_scale': 1e-5, 'norm_epsilon': 1e-5,
                'dtype': 'bfloat16', 'remat': 'full'},
    'objective': PUBLISHED['objective'] | {
        'out_dim': 262144, 'hidden_dim': 8192, 'bottleneck_dim': 512, 'patch_out_dim': 98304, 'patch_hidden_dim': 4096,
        'patch_bottleneck_dim': 384, 'temperature_epochs': 100 * BIG_EPOCH, 'freeze_epochs': 5 * BIG_EPOCH,
        'start_momentum': 0.994, 'final_momentum': 0.994, 'koleo_group': 16},
    'optimizer': PUBLISHED['optimizer'] | {
        'b2': 0.99, 'clip': 30.0, 'layer_decay': 0.98, 'final_weight_decay': 0.04, 'warmup_steps': 100_000,
        'final_learning_rate': 5e-5 * 4 * (4096 / 1024) ** 0.5},
    'augment': PUBLISHED['augment'] | {'local_size': 112, 'flip': (0.0, 0.0)},
}

VARIANTS = {
    'published': PUBLISHED,
    '7b': BIG,
    'gram': BIG | {
        'init_parts': 'all',
        'steps': 200_000,
        'learning_rate': 3e-5 * 4 * (4096 / 1024) ** 0.5,
        'objective': BIG['objective'] | {
            'start_momentum': 0.999, 'final_momentum': 0.999, 'local_weight': 0.5, 'start_local_weight': 1.0,
            'local_warmup': 1000, 'gram_weight': 2.0, 'gram_start': 0, 'gram_warmup': 1000, 'gram_every': 10_000,
            'gram_updates': 3, 'start_temperature': 0.07, 'freeze_epochs': 0.0},
        'optimizer': BIG['optimizer'] | {'warmup_steps': 1000,
                                         'final_learning_rate': 3e-5 * 4 * (4096 / 1024) ** 0.5},
        'augment': BIG['augment'] | {'gram_size': 512},
    },
    'high_res': BIG | {
        'init_parts': 'target',
        'image_size': 768,
        'batch_size': 2048,
        'steps': 30_000,
        'learning_rate': 1.25e-5 * 4 * (2048 / 1024) ** 0.5,
        'objective': BIG['objective'] | {
            'start_momentum': 0.999, 'final_momentum': 0.999, 'local_weight': 0.5, 'gram_weight': 1.5, 'gram_start': 0,
            'gram_every': 0, 'start_temperature': 0.07, 'freeze_epochs': 0.0},
        'optimizer': BIG['optimizer'] | {'warmup_steps': 10_000,
                                         'final_learning_rate': 1.25e-5 * 4 * (2048 / 1024) ** 0.5},
        'augment': BIG['augment'] | {
            'local_size': 224, 'gram_size': 1152, 'sizes': (512, 768, 768, 768, 768),
            'local_sizes': (112, 112, 160, 224, 336), 'gram_sizes': (768, 1152, 1152, 1152, 1152),
            'size_shares': (0.3, 0.3, 0.3, 0.05, 0.05)},
    },
    'laptop': {
        'method': 'dinov3',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 600,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'encoder': {'drop_path': 0.0, 'layer_scale': 1.0},
        'objective': {'out_dim': 1024, 'hidden_dim': 512, 'bottleneck_dim': 128, 'start_momentum': 0.99,
                      'gram_weight': 1.0, 'gram_start': 300, 'gram_every': 100, 'gram_updates': 2},
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
