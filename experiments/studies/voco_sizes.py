"""VoCo's sizes over tasks: which width of encoder pays for which task (Wu et al. 2024, arXiv 2410.09890).

`published` pretrains the encoders B, L and H of VoCo's second release (experiments/voco.py) on one corpus and judges
each by fine-tuning on masks, by frozen patch tokens on the same masks and by frozen vectors on a label. Differs: what
the recipe differs in; tasks are columns of one corpus, there 51 data sets.

  jaxmed study experiments/studies/voco_sizes.py --dry-run --topology v5p:4x4x4 --rows 160000
  jaxmed study experiments/studies/voco_sizes.py:published --data corpus --out study
  jaxmed prepare tissue --out corpus
  jaxmed study experiments/studies/voco_sizes.py:laptop --data corpus --out study

Not run here at full size. `laptop`: three widths of a small ViT on slices of one averaged brain, two seeds, on 2 CPU
cores, judged on tissues and on places; it shows that the axis and the tasks run, and nothing of patients.
"""

from jaxmed.study.grid import Study

TASKS = ({'task': 'finetune', 'label': 'mask', 'options': {'task': 'segment'}}, {'task': 'dense', 'label': 'mask'},
         {'task': 'classify', 'label': 'region'})
QUICK = ({'task': 'finetune', 'label': 'mask', 'options': {'task': 'segment', 'steps': 100, 'eval_every': 100}},
         *TASKS[1:])
SMALL = {'model': 'vit_micro/8', 'steps': 200, 'eval_every': 200, 'checkpoint_every': 100, 'evaluators': 'loss',
         'augment.channel_sampling': 'none'}
WIDTHS = {f'w{w}': {'encoder.embed_dim': w, 'encoder.num_heads': w // 16} for w in (32, 64, 128)}

STUDIES = {
    'published': Study('experiments/voco.py:published', {'model': ('swin_unetr_48', 'swin_unetr_96', 'swin_unetr_192')},
                       judges=TASKS),
    'laptop': Study('experiments/voco.py:laptop', {'width': WIDTHS, 'seed': (0, 1)}, shared=SMALL, judges=QUICK),
}
VARIANTS = tuple(STUDIES)


def get_study(variant: str = 'published') -> Study:
  """The grid of a variant."""
  return STUDIES[variant]
