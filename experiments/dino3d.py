"""3DINO: DINOv2 on 3D crops of CT, MR and PET, ViT-L/16 (Xu et al. 2025, npj Digital Medicine, arXiv 2501.11755).

Reproduces AICONSlab/3DINO: dinov2/configs/ssl3d_default_config.yaml, 125,000 steps of 512 volumes on 4 GPUs, crops of
96^3 and 48^3 voxels that cover a share of the slices and, by itself, a share of their plane, and hidden patches drawn
one by one. `high_res` is configs/train/vit3d_highres.yaml: 12,500 steps of 256 volumes with crops of 112^3 and 64^3,
from the teacher of the first; heads and teacher go on too. Epochs of 1250 steps are turned into epochs of about 100,000
volumes. Differs: masks are drawn over the global batch (there over a device's); slices lie along the first axis;
intensities are cut to the same percentiles and have mean 0 and deviation 1 (there -1 to 1); volumes are shrunk to at
most 1.5 crops first (there a crop is cut from the whole). Of gamma, noise and shifted histograms a view has one there:
here gamma, log-uniform, and noise have the probability of each, and no histogram is shifted. No sharpening and no Gibbs
noise; views that are there blurred or else sharpened are here blurred with one half of the probability. Quarter turns
are in the plane of slices alone (there in all three).

  jaxmed train experiments/dino3d.py --data VOLUMES --out RUN mesh.fsdp=8
  jaxmed train experiments/dino3d.py:high_res --data VOLUMES --out RUN2 init=RUN mesh.fsdp=8
  jaxmed prepare demo --out corpus && jaxmed train experiments/dino3d.py:laptop --data corpus --out RUN

VOLUMES is what `jaxmed prepare SCANS --volumes whole --crop foreground` makes. Published: about 10 days on 4 A100-80GB,
and 1 day for the second stage (README.md). Not run here at full size. `laptop`: the demo corpus on 2 CPU cores, of two
axes, where shares of slices mean nothing; small heads.
"""

from ml_collections import ConfigDict

EPOCH = 1250 * 512 / 100_000  # an official epoch in epochs of the data
HIGH = 125 * 256 / 100_000
THIRD = 0.8 / 3  # of three changes one is drawn, which happens with 0.8

PUBLISHED = {
    'method': 'dinov2',
    'model': 'vit_large/16',
    'image_size': 96,
    'batch_size': 512,
    'steps': 100 * 1250,
    'learning_rate': 2e-3 * (512 / 1024) ** 0.5,
    'encoder': {'drop_path': 0.3, 'drop_path_law': 'exact', 'layer_scale': 1e-5, 'pos_interpolation': 'offset',
                'dtype': 'bfloat16'},
    'objective': {'centering': 'sinkhorn', 'separate_head': True, 'out_dim': 65536, 'hidden_dim': 2048,
                  'bottleneck_dim': 256, 'patch_out_dim': 65536, 'patch_bottleneck_dim': 256, 'scattered': True,
                  'start_temperature': 0.04, 'teacher_temperature': 0.07, 'temperature_epochs': 30 * EPOCH,
                  'freeze_epochs': EPOCH, 'start_momentum': 0.992, 'mask_probability': 0.5, 'mask_ratio': (0.2, 0.75),
                  'dino_weight': 1.0, 'ibot_weight': 1.0, 'koleo_weight': 0.1, 'koleo_group': 128},
    'optimizer': {'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.04, 'final_weight_decay': 0.4, 'warmup_steps': 10 * 1250,
                  'clip': 3.0, 'clip_scope': 'module', 'final_learning_rate': 1e-6, 'layer_decay': 0.9,
                  'patch_embed_scale': 0.2},
    'augment': {'views': 2, 'local_views': 8, 'local_size': 48, 'scale': (0.48, 1.0), 'slice_scale': (0.5, 1.0),
                'local_scale': (0.16, 0.48), 'local_slice_scale': (0.2, 0.5), 'ratio': (0.9, 1 / 0.9),
                'flip': (0.3,), 'rotate90': (0.3,), 'gamma': 1.0, 'gamma_probability': (THIRD,),
                'noise_range': (0.0, 0.002), 'noise_probability': (THIRD,), 'blur': 1.5,
                'blur_probability': (0.5, 0.05, 0.5), 'brightness': 0.0, 'contrast': 0.0, 'color': (0.0,),
                'grayscale': (0.0,)},
    'loader': {'normalize': 'percentile:0.05:99.95'},
}

VARIANTS = {
    'published': PUBLISHED,
    'high_res': PUBLISHED | {
        'init_parts': 'all',
        'image_size': 112,
        'batch_size': 256,
        'steps': 100 * 125,
        'learning_rate': 1e-3 * (256 / 1024) ** 0.5,
        'objective': PUBLISHED['objective'] | {'temperature_epochs': 30 * HIGH, 'freeze_epochs': HIGH,
                                               'koleo_group': 64},
        'optimizer': PUBLISHED['optimizer'] | {'warmup_steps': 10 * 125},
        'augment': PUBLISHED['augment'] | {'local_size': 64},
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
        'objective': {'centering': 'sinkhorn', 'out_dim': 1024, 'hidden_dim': 512, 'bottleneck_dim': 128,
                      'scattered': True, 'start_momentum': 0.99, 'mask_ratio': (0.2, 0.75)},
        'optimizer': {'final_weight_decay': 0.1, 'layer_decay': 1.0},
        'augment': {'views': 2, 'local_views': 4, 'local_size': 32, 'scale': (0.48, 1.0), 'slice_scale': (0.5, 1.0),
                    'local_scale': (0.16, 0.48), 'local_slice_scale': (0.2, 0.5), 'ratio': (0.9, 1 / 0.9),
                    'channel_sampling': 'hcs', 'gamma': 1.0, 'gamma_probability': (0.27,), 'brightness': 0.0,
                    'contrast': 0.0, 'color': (0.0,), 'grayscale': (0.0,)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
