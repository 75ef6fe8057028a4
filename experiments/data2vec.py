"""data2vec 2.0: contextual latents with ViT-B/16 on ImageNet-1k (Baevski et al. 2022, arXiv 2212.07525).

Reproduces facebookresearch/fairseq, examples/data2vec/config/v2/base_images_only_task.yaml: 375,300 steps of 256 images
masked 16 ways each, rate 1e-3, warm-up of 50,040 steps, clip 4, EMA 0.9998 to 0.99999 in 100,000 steps. Its mask of 0.8
hides 157 of the 196 patches. Differs: blocks are pre-norm (there post-norm); positions are those of a plain ViT, and
the class token begins with a deviation of 0.02 (there 1, before a norm); biases and norms do not decay (there they do,
by an oversight).

  jaxmed train experiments/data2vec.py --data IMAGENET --out RUN
  jaxmed prepare demo --out corpus && jaxmed train experiments/data2vec.py:laptop --data corpus --out RUN

Published: 84.5 % top-1 on ImageNet-1k after fine-tuning (paper, from memory; it may be of a longer run). The file asks
for 16 GPUs. Not run here at full size. `laptop`: the demo corpus on 2 CPU cores; half hidden, two ways, a small
decoder.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'data2vec',
        'model': 'vit_base/16',
        'image_size': 224,
        'batch_size': 256,
        'steps': 375_300,
        'learning_rate': 1e-3,
        'encoder': {'patch_init': 'xavier'},
        'objective': {'masks': 16, 'mask_ratio': 157 / 196, 'block': 3, 'block_share': 0.07, 'top_blocks': 10,
                      'cls_weight': 2.56, 'noise': 0.01, 'momentum_start': 0.9998, 'momentum_end': 0.99999,
                      'momentum_share': 100_000 / 375_300, 'decoder_dim': 768, 'decoder_depth': 6,
                      'decoder_groups': 16},
        'optimizer': {'b1': 0.9, 'b2': 0.95, 'weight_decay': 0.05, 'warmup_steps': 50_040, 'clip': 4.0,
                      'clip_scope': 'global'},
        'augment': {'scale': (0.2, 1.0), 'flip': (0.0, 0.5)},
    },
    'laptop': {
        'method': 'data2vec',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 32,
        'steps': 500,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'objective': {'masks': 2, 'mask_ratio': 0.5, 'block': 1, 'momentum_start': 0.99, 'momentum_end': 0.999,
                      'momentum_share': 1.0, 'decoder_depth': 2, 'decoder_groups': 8},
        'augment': {'channel_sampling': 'hcs', 'scale': (0.6, 1.0)},
        'loader': {'label': 'region'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
