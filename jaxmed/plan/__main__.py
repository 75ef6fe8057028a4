"""The process that `worker` starts: reads a job (JSON) on stdin, compiles, writes what it found on stdout."""

import json
import sys

from jaxmed.errors import UserError
from jaxmed.plan import plan

try:
  answer = plan.compile_step(json.load(sys.stdin))
except UserError as e:
  answer = {'mistake': str(e)}
print(json.dumps(answer))
