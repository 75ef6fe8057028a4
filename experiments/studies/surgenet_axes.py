"""SurgeNet's axes: how much, how long, which architecture, how diverse (Jaspers et al. 2024, arXiv 2407.17904).

DINO on frames of surgery, the setting of experiments/surgenet.py. The paper varies the frames (one procedure or all),
their number, the length of the training and the architecture, and judges by tasks of surgery. Each variant here is one
of these axes, the others as in the recipe; data size once at equal steps and once at equal epochs, which answer
different questions: does more data help at the same compute, and does it pay for the compute that it asks for.

  jaxmed study experiments/studies/surgenet_axes.py --dry-run --topology v5e:4x4 --rows 2600000
  jaxmed study experiments/studies/surgenet_axes.py:published --data FRAMES --out study init=FILE
  jaxmed prepare demo --out corpus
  jaxmed study experiments/studies/surgenet_axes.py:laptop --data corpus --out study

`published` (size at equal steps), `epochs` (at equal epochs), `duration`, `architecture`, `diversity` (name the sources
of the corpus in a copy of this file: those here are of the demo). Not run here at full size. `laptop`, `laptop_epochs`,
`laptop_duration`, `laptop_architecture`, `laptop_diversity`: the demo corpus on 2 CPU cores, minutes each; they show
that each axis runs, and say nothing of surgery.
"""

from collections.abc import Mapping
from typing import Any

from jaxmed.study.grid import Study

BASE, LAPTOP = 'experiments/surgenet.py', 'experiments/surgenet.py:laptop'
SHORT = {'steps': 100, 'eval_every': 100, 'checkpoint_every': 50, 'evaluators': 'loss,health', 'batch_size': 16,
         'augment.local_views': 2}
BRAIN = {'loader.sources': 'icbm152'}  # subsets of one kind of records
JUDGES = ('loss', {'task': 'classify', 'label': 'region'})
SIZES, SMALL = (250_000, 1_000_000, 'all'), (250, 1000, 'all')


def _small(axes: Mapping[str, Any], shared: Mapping[str, Any] = {}, **more: Any) -> Study:
  return Study(LAPTOP, axes, judges=JUDGES, shared=SHORT | dict(shared), **more)


STUDIES = {
    'published': Study(BASE, {'samples': SIZES}, equal='steps'),
    'epochs': Study(BASE, {'samples': SIZES}, equal='epochs'),
    'duration': Study(BASE, {'epochs': (10.0, 25.0, 50.0, 100.0)}),
    'architecture': Study(BASE, {'model': ('caformer_s18', 'convnextv2_tiny', 'pvt_v2_b2')}),
    'diversity': Study(BASE, {'sources': ('fundus', 'fundus,histology', 'all')}, equal='steps'),
    'laptop': _small({'samples': SMALL, 'seed': (0, 1)}, BRAIN, equal='steps'),
    'laptop_epochs': _small({'samples': SMALL, 'seed': (0, 1)}, BRAIN, equal='epochs'),
    'laptop_duration': _small({'steps': (25, 50, 100), 'seed': (0, 1)}),
    'laptop_architecture': _small({'model': ('caformer_micro', 'convnextv2_micro', 'pvt_v2_micro'), 'seed': (0, 1)}),
    'laptop_diversity': _small({'sources': ('icbm152', 'icbm152,fundus', 'all'), 'seed': (0, 1)}, equal='steps'),
}
VARIANTS = tuple(STUDIES)


def get_study(variant: str = 'published') -> Study:
  """The grid of a variant."""
  return STUDIES[variant]
