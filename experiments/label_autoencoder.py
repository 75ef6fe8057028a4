"""Label autoencoder: a V-Net without skips makes corrupted masks of the abdomen whole (Adiga et al. 2023, arXiv
2310.16099).

Reproduces adigasu/Anatomically-aware_Uncertainty_for_Semi-supervised_Segmentation, code_DAE/train_DAE.py: 26 of 260
masks of FLARE 2021 (liver, kidneys, spleen, pancreas) in crops of 144 x 144 x 96, 4 a step, SGD at 0.1 with decay 1e-4
along a cosine, half squared error and half 1 minus Dice. Differs: stages stride by convolutions of 3 (there of 2),
SGD is Nesterov's, weights begin by He's law (there uniform by the outputs, of norms too), crops are flipped along both
axes of a slice and not turned by right angles, the cosine ends at the rate that theirs, of 2000 steps more, has then.

  jaxmed train experiments/label_autoencoder.py --data VOLUMES --out LABELS image_size=96,144,144 \
      loader.load_size=96,144,144
  jaxmed prepare tissue --out tissue
  jaxmed train experiments/label_autoencoder.py:laptop --data tissue --out LABELS

Published: the repository gives no score of it. Not run here at full size. `laptop`: tissues of slices on 2 CPU cores.
"""

from ml_collections import ConfigDict

VNET = {'depths': (1, 3, 4, 4, 4), 'dims': (16, 32, 64, 128, 256), 'norm': 'batch', 'slope': 0.0}
VARIANTS = {
    'published': {
        'method': 'label_autoencoder',
        'model': 'nnunet_plain',
        'image_size': 144,
        'batch_size': 4,
        'steps': 50_000,
        'learning_rate': 0.1,
        'eval_every': 1000,
        'checkpoint_every': 1000,
        'evaluators': 'loss,dice',
        'encoder': VNET,
        'objective': {'code': 512, 'depths': (3, 3, 2, 1), 'corruption': 0.2, 'noise': 0.1, 'code_noise': 0.0},
        'optimizer': {'name': 'sgd', 'b1': 0.9, 'weight_decay': 1e-4, 'warmup_steps': 0, 'final_learning_rate': 3.6e-4,
                      'clip': 0.0},
        'augment': {'scale': (1.0, 1.0), 'flip': (0.5,), 'zoom_probability': (0.5,), 'zoom': (0.9, 1.25)},
        'loader': {'fit': 'crop', 'load_size': 144},
    },
    'laptop': {
        'method': 'label_autoencoder',
        'model': 'nnunet_micro',
        'image_size': 48,
        'batch_size': 16,
        'steps': 300,
        'learning_rate': 2e-3,
        'eval_every': 100,
        'evaluators': 'loss,dice',
        'encoder': {'norm': 'batch', 'slope': 0.0},
        'objective': {'code': 256, 'depths': (1,)},
    },
}


def get_config(variant: str = 'published') -> ConfigDict:
  """What a variant sets."""
  return ConfigDict(VARIANTS[variant])
