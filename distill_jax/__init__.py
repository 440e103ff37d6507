"""Knowledge distillation in JAX.

`from distill_jax import losses` imports jax and nothing else; everything that trains needs the `train` extra.
"""

from distill_jax.version import __version__

__all__ = ["__version__", "load_student"]


def __getattr__(name):
  if name == "load_student":  # lazy: it needs safetensors, which `losses` does not
    from distill_jax.storage.student import load_student

    return load_student
  raise AttributeError(f"module 'distill_jax' has no attribute {name!r}")
