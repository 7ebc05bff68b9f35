"""`python -m distzo2`."""

import sys

from distzo2.cli import main

sys.exit(main())
