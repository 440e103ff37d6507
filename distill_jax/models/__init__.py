"""Networks as Models: adapters for what you already have, and small networks of our own."""

from distill_jax.models.adapters import from_apply, from_linen, from_nnx

__all__ = ["from_apply", "from_linen", "from_nnx"]
