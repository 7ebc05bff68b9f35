"""`python -m distzo2`."""

import sys

from distzo2.cli.main import main

sys.exit(main())
