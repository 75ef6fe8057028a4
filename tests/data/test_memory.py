"""The pipeline's memory does not grow with the steps it has run."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, sys
from jaxmed.data.feed.pipeline import train_batches
from jaxmed.data.feed.sampling import Mixture, make
from jaxmed.data.corpus.open import open_source

def resident():
  with open('/proc/self/statm') as f:
    return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')

source = open_source(sys.argv[1]).select('train')
mixture = Mixture(balance='tissue', alpha=0.5, subjects='balanced') if sys.argv[2] == 'mixture' else Mixture()
batches = train_batches(source, batch_size=1, size=(4, 4), vocabulary=source.channels, seed=0, fit='crop', threads=2,
                        sampler=make(source, mixture, 0))
marks = []
for step in range(1, 10_001):
  next(batches)
  if step % 2000 == 0:
    marks.append(resident())
print(json.dumps(marks))
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('kind', ['shuffle', 'mixture'])
def test_memory_is_constant_over_ten_thousand_steps(corpus, kind):
  done = subprocess.run([sys.executable, '-c', PROGRAM, str(corpus), kind], capture_output=True, text=True, check=False)
  assert not done.returncode, done.stderr
  marks = json.loads(done.stdout.splitlines()[-1])
  assert len(marks) == 5
  assert max(marks) - marks[0] < 8 << 20, marks
