"""``python -m hvdnoise``."""

import sys

from hvdnoise.cli import main

sys.exit(main())
