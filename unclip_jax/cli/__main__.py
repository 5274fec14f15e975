"""`python -m unclip_jax.cli` is `unclip`."""

from unclip_jax.cli import script

script()
