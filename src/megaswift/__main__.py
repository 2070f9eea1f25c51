"""python -m megaswift is the swift command."""

import sys

from megaswift.cli import main

sys.exit(main())
