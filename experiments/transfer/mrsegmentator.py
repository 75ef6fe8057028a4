"""MRSegmentator's question: what do CT volumes teach a segmenter of MR? (Haentze et al. 2024, arXiv 2405.06463).

There one nnU-Net of 40 classes is trained on MR and CT together and judged on MR and CT that it has not seen. The arms
here are that network and its parts: trained on CT alone (`ct`), on MR alone (`mr`), and on both (`joint`), each judged
on the test records of both corpora, against `ct`: on the corpus mr the arm ct is the transfer from CT to MR. One
channel holds either modality, normalised by each image; classes that a corpus does not annotate (column `annotated`)
are merged into its background, so label sets may differ.

  jaxmed transfer experiments/transfer/mrsegmentator.py --data ct=CT --data mr=MR --out OUT
  jaxmed prepare phantoms --subjects 40 --size 32 --out ct
  jaxmed prepare phantoms --subjects 40 --size 32 --modality mr --out mr
  jaxmed transfer experiments/transfer/mrsegmentator.py:laptop --data ct=ct --data mr=mr --out OUT

Differs: five folds and their ensemble there, three seeds here; its MR labels are corrected predictions of earlier
rounds. Its Dice is of volumes brought to 1.5 x 1.5 x 3 mm and leaves out classes that a case lacks; here it is on the
grid of the corpus, and a class that is made up counts 0. Crops of 128^3 here, planned there; the trainer is nnU-Net's
(250,000 steps). Axes are not mirrored, as classes are left and right. Published (its repository, v1.2): Dice 0.91 on
NAKO GRE, 0.89 on T2-HASTE, 0.79 on AMOS MR, 0.84 on AMOS CT, 0.74 on TotalSegmentator MR. Not run here at full size.
`laptop`: a small U-Net on synthetic phantoms of the abdomen, the same anatomies in both; not run to its end.
"""

from jaxmed.study.transfer import Transfer

BASE = 'experiments/finetune_segment.py:nnunet'
SAME = {'scan': ('CT', 'MR')}
ARMS = {'ct': {'train': ('ct',)}, 'mr': {'train': ('mr',)}, 'joint': {'train': ('ct', 'mr')}}
CORPORA = {'ct': {'modality': 'CT'}, 'mr': {'modality': 'MR'}}
SHARED = {'augment.flip': 0.0, 'loader.normalize': 'image'}
SMALL = {
    'model': 'resenc_micro', 'encoder.dims': (8, 16, 32), 'encoder.depths': (1, 1, 1), 'encoder.strides': (1, 2, 2),
    'image_size': 32, 'loader.load_size': 32, 'steps': 60, 'eval_every': 20, 'checkpoint_every': 20,
    'objective.deep_supervision': False,
    **{f'augment.{name}_probability': (0.0,) for name in ('rotation', 'zoom', 'soften', 'coarse')},
}


def _made(seeds: tuple[int, ...], more: dict) -> Transfer:
  arms = {name: arm | {'kind': 'scratch'} for name, arm in ARMS.items()}
  return Transfer(CORPORA, arms, BASE, SHARED | more, against='ct', seeds=seeds, same=SAME)


TRANSFERS = {'published': _made((0, 1, 2), {}), 'laptop': _made((0,), SMALL)}
VARIANTS = tuple(TRANSFERS)


def get_transfer(variant: str = 'published') -> Transfer:
  """What a variant declares."""
  return TRANSFERS[variant]
