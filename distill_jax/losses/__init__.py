"""Distillation losses: pure functions of arrays that import jax and nothing else.

`f(student, teacher, ..., *, hyperparameters)`: logits in, never probabilities; channels last. A loss gives
one value per example or token, unreduced, to be averaged with `distill_jax.reduce.mean(values, where)`; a
loss that relates the rows of a batch gives a scalar and takes `where=` and `axis_name=`. Low-precision inputs
are computed in float32. README.md in this folder is a table of all of them.
"""

from distill_jax.losses.features import cosine, hint
from distill_jax.losses.logits import kl_divergence, soft_cross_entropy

__all__ = ["cosine", "hint", "kl_divergence", "soft_cross_entropy"]
