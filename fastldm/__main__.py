"""`python -m fastldm` is the command line."""

import sys

from fastldm.cli import main

sys.exit(main())
