"""SegBook's question: does supervised pretraining on CT pay on many data sets? (Ye et al. 2024, arXiv 2411.14525).

There STU-Net B, L and H, pretrained on TotalSegmentator, are fine-tuned on 87 data sets beside the same network from
scratch, one split each, and compared by foreground Dice of whole test volumes: 17,983 training and 4,525 test cases.
`published` has that shape for the data sets that you name: pretrained, scratch and linear arms of one encoder, crops of
128^3 and nnU-Net's trainer with deep supervision (250,000 steps, SGD at 1e-2 from scratch, also 1e-3, the better one on
val taken), wins in total, by modality and by number of training subjects.

  jaxmed import STUNET.model --format stunet --out stunet_b.safetensors
  jaxmed transfer experiments/transfer/segbook_like.py --data liver:CT=LIVER --data heart:MR=HEART \\
      --encoder stunet_b.safetensors --out OUT
  jaxmed prepare tissue --out tissue && jaxmed prepare regions --out regions
  jaxmed train --data tissue --out pre method=mae model=vit_micro/8 encoder.depth=3 encoder.embed_dim=64 \
      encoder.num_heads=2 steps=200
  jaxmed transfer experiments/transfer/segbook_like.py:laptop --data tissue=tissue --data regions=regions \\
      --encoder pre --out OUT

Differs: SegBook has nnU-Net v1's plan for each data set and transfers the decoder, too; here one patch size and a fresh
decoder. It has one rate for each arm and no linear one; it counts where a score is higher (column `higher`), without
intervals. Published, of the 87 rows of its table (`STU_Benchmark_Information.csv`): mean Dice 0.7330 of nnU-Net,
0.7349, 0.7397 and 0.7355 of B, L and H from scratch, 0.7550, 0.7637 and 0.7631 fine-tuned; H fine-tuned is higher than
H from scratch on 77 of 87. Not run here at full size. `laptop`: slices of one real T1 template with masks of tissue
and of regions, a small ViT pretrained by MAE on the images of the first; 2 CPU cores. It was not run to its end yet.
"""

from jaxmed.study.transfer import Transfer

BASE = 'experiments/finetune_segment.py:nnunet'
RATES = (1e-2, 1e-3)  # nnU-Net's, and that of nnssl's fine-tuning

TRANSFERS = {
    'published': Transfer(
        corpora={'*': {'task': 'segment'}},
        arms={'pretrained': {'rates': RATES}, 'scratch': {'rates': RATES}, 'linear': {'rates': RATES}},
        base=BASE, sizes=(30, 100, 300)),
    'laptop': Transfer(
        corpora={'tissue': {'modality': 'MR'}, 'regions': {'modality': 'MR'}},
        arms={'pretrained': {}, 'scratch': {'rates': (1e-3, 3e-4)}, 'linear': {'rates': (1e-2,)}},
        base={'steps': 60, 'batch_size': 16, 'eval_every': 20, 'checkpoint_every': 20,
              **{f'augment.{name}_probability': (0.0,) for name in ('rotation', 'zoom', 'soften', 'coarse')}}),
}
VARIANTS = tuple(TRANSFERS)


def get_transfer(variant: str = 'published') -> Transfer:
  """What a variant declares."""
  return TRANSFERS[variant]
