"""``python -m lightning_spectral`` is ``lightning-spectral``."""

import sys

from lightning_spectral.cli import main

sys.exit(main())
