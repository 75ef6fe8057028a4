"""`python -m jaxmed`."""

import sys

from jaxmed.cli import main

sys.exit(main())
