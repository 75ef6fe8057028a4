"""Joint clustering: slices and volumes of CT and MR in one ResNet-50 (Nguyen et al. 2023, arXiv 2212.01893).

Reproduces the joint stage of duyhominhnguyen/Self-supervised-Image-Volume-Intra-Inter-Contrastive (ssl_swav_3D.py):
volumes of 64 slices of 128 x 128, 3000 prototypes, a transformer of 4 layers, 640 wide, SGD with LARC at 0.01, 100
epochs of 12 volumes on 2 GPUs, gradients cut at 2. `deepcluster` is ssl_deepcluster_3D.py: three sets of four
clusters, 8 volumes a step. Before it come the clustering of slices alone, experiments/swav.py or deepcluster.py, and
`masked` (mask_swav_3D.py), the transformer alone on hidden slices. Differs: see the method's docstring, and what
experiments/README.md says of LARS; each change of a view is drawn by itself with the probability of one of seven
(there a view has one of seven); no resampling along one axis; windows of 64 slices of a volume (there its middle 64,
or zeros around fewer); no flips along slices.

  jaxmed train experiments/joint_clustering.py:masked --data SLICES --out MASKED init=RUN
  jaxmed train experiments/joint_clustering.py --data SLICES --out RUN2 init=MASKED init_parts=all
  jaxmed prepare demo --out corpus && jaxmed train experiments/joint_clustering.py:laptop --data corpus --out RUN

SLICES is what `jaxmed prepare` makes of volumes by default, with images beside them. Published: segmentation of MMWHS
and BraTS and two classifications after fine-tuning (tables of the paper, not read here). Not run here at full size.
`laptop`: the demo corpus on 2 CPU cores, windows of 8 slices.
"""

from ml_collections import ConfigDict

ONE = 1 / 7  # of seven changes, a view has one
PUBLISHED = {
    'method': 'joint_clustering',
    'model': 'resnet50',
    'image_size': 128,
    'batch_size': 12,
    'epochs': 100.0,
    'learning_rate': 1e-2,
    'objective': {'clustering': 'swav', 'num_prototypes': 3000, 'temperature': 0.1, 'epsilon': 0.05,
                  'sinkhorn_iterations': 3, 'queue_length': 0, 'freeze_prototypes': 313, 'mask_ratio': 0.1,
                  'slice_weight': 0.0, 'masked_weight': 0.0, 'dim': 640, 'depth': 4, 'num_heads': 8,
                  'mlp_ratio': 1.125},
    'optimizer': {'name': 'lars', 'b1': 0.9, 'weight_decay': 1e-6, 'warmup_epochs': 10.0, 'clip': 2.0},
    'augment': {'views': 2, 'scale': (1.0, 1.0), 'flip': (0.0, 0.0), 'rotation': (0.0, 10.0),
                'rotation_probability': (ONE,), 'zoom': (0.9, 1.1), 'zoom_probability': (ONE,),
                'noise_range': (0.0, 0.25), 'noise_probability': (ONE,), 'blur': 2.0, 'blur_probability': (ONE,),
                'bias': 0.5, 'bias_probability': (ONE,), 'gamma': 0.35, 'gamma_probability': (ONE,), 'brightness': 0.0,
                'contrast': 0.0},
    'loader': {'fit': 'crop', 'load_size': 128, 'window': 64, 'window_group': 'path', 'window_order': 'id'},
}
ALONE = {'slice_weight': 0.0, 'volume_weight': 0.0, 'masked_weight': 1.0}

VARIANTS = {
    'published': PUBLISHED,
    'deepcluster': PUBLISHED | {
        'batch_size': 8,
        'objective': PUBLISHED['objective'] | {'clustering': 'deepcluster', 'num_prototypes': 4, 'num_sets': 3,
                                               'kmeans_iterations': 10},
        'optimizer': PUBLISHED['optimizer'] | {'clip': 0.0},
    },
    'masked': PUBLISHED | {
        'batch_size': 8,
        'freeze': 'encoder',
        'objective': PUBLISHED['objective'] | ALONE,
        'optimizer': PUBLISHED['optimizer'] | {'clip': 0.0},
    },
    'laptop': {
        'method': 'joint_clustering',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 8,
        'steps': 400,
        'learning_rate': 5e-4,
        'eval_every': 200,
        'objective': {'num_prototypes': 64, 'depth': 2, 'num_heads': 4, 'hidden_dim': 512},
        'augment': {'scale': (0.4, 1.0), 'channel_sampling': 'hcs'},
        'loader': {'label': 'region', 'window': 8},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
