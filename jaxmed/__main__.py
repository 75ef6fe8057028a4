"""`python -m jaxmed`."""

import sys

from jaxmed.cli import command

sys.exit(command())
