"""How often the 95 % intervals of a law's numbers hold the truth, on simulated grids of runs.

Needs `make install` alone.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Sequence

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from jaxmed.study import law_intervals, laws  # noqa: E402
from tools.needs import run_script  # noqa: E402
