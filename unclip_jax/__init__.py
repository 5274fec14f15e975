"""unclip_jax: DALL-E 2 (unCLIP, Ramesh et al. 2022, arXiv 2204.06125) in JAX and Flax."""

__version__ = "0.1.0"
