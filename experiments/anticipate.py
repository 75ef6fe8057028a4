"""Current and future phases of operations by the losses of SWAG (Boels et al. 2024, arXiv 2412.18849).

Reproduces maxboels/SWAG-surgical-workflow-anticipative-generation, conf/config.yaml and expts: a frozen ViT-B/16, a
transformer of 2 layers, 8 heads and width 512 over the last 20 frames with pooled keys of 64, 30 future tokens of 60 s
with a class for the end, SGD with Nesterov's momentum at 3e-4, decay 1e-5, 40 epochs with a rise over 5. Losses weigh
0.5, 0.5 and 0.005. Differs: the network, see its module; a sample is a whole video with 64 frames whose future is
trained (there 64 frames of any videos with 1,440 frames before them); no class weights (there frequencies); no
features of frames are predicted; the last epoch, not the best on the test set.

  jaxmed train experiments/anticipate.py --data FRAMES --out RUN init=ENCODER
  jaxmed prepare demo --out corpus && jaxmed train experiments/anticipate.py:laptop --data corpus --out RUN

FRAMES is a corpus of frames, one a second, with columns `phase` and `frame_seconds`, a subject a video
(docs/guide/surgical.md). Published:
weighted F1 of future tokens of 32.1 % over 20 minutes on Cholec80 and 41.3 % over 30 on AutoLaparo (abstract, SP*).
Not run here at full size. `laptop`: regions of the demo corpus on 2 CPU cores, windows of 4 patches, an encoder that is
trained too.
"""

from ml_collections import ConfigDict

VARIANTS = {
    'published': {
        'method': 'anticipate',
        'model': 'vit_base/16',
        'image_size': 224,
        'batch_size': 1,
        'epochs': 40.0,
        'learning_rate': 3e-4,
        'objective': {'tokens': 30, 'stride': 60.0, 'fps': 1.0, 'dim': 512, 'depth': 2, 'num_heads': 8,
                      'hidden_dim': 1024, 'look_back': 20, 'pooled_dim': 64, 'dropout': 0.1, 'current_weight': 0.5,
                      'future_weight': 0.5, 'time_weight': 0.005, 'anchors': 64, 'freeze_encoder': True,
                      'feature': 'cls'},
        'optimizer': {'name': 'sgd', 'b1': 0.9, 'weight_decay': 1e-5, 'warmup_epochs': 5.0,
                      'final_learning_rate': 1e-7},
        'augment': {'scale': (1.0, 1.0), 'flip': (0.0, 0.0)},
        'loader': {'label': 'phase', 'window': 6144, 'window_group': 'subject', 'window_order': 'frame_seconds'},
    },
    'laptop': {
        'method': 'anticipate',
        'model': 'channel_vit_micro/16',
        'image_size': 48,
        'batch_size': 8,
        'steps': 400,
        'learning_rate': 1e-3,
        'eval_every': 200,
        'objective': {'tokens': 2, 'stride': 1.0, 'dim': 64, 'num_heads': 4, 'hidden_dim': 128, 'look_back': 4,
                      'anchors': 2, 'freeze_encoder': False},
        'loader': {'label': 'region', 'window': 4, 'window_group': 'path', 'window_order': 'id'},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
