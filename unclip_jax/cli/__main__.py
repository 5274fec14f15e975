"""`python -m unclip_jax.cli` is `unclip`."""

import sys

from unclip_jax.cli import main

sys.exit(main())
