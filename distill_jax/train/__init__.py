"""Training: pure functions (`make_init`, `make_train_step`, `make_eval_step`) and the loop that drives them (`fit`)."""

from distill_jax.train.loop import FitResult, NonFiniteError, fit
from distill_jax.train.replay import replayed
from distill_jax.train.step import make_eval_step, make_init, make_train_step

__all__ = [
  "FitResult",
  "NonFiniteError",
  "fit",
  "make_eval_step",
  "make_init",
  "make_train_step",
  "replayed",
]
