"""Training: pure functions for loops of your own, and the loop that drives them.

`fit` distills; `evaluate` and `predict` apply what it returns. `make_loss_fn`, `make_train_step`
and `make_eval_step` are the pure functions inside.
"""

from distill_jax.errors import naming_extras

with naming_extras():
  from distill_jax.train.evaluation import evaluate, evaluate_models, make_eval_step
  from distill_jax.train.loop import FitResult, fit
  from distill_jax.train.loss_fn import make_loss_fn
  from distill_jax.train.optimizers import evaluation_variables, params_ema
  from distill_jax.train.options import CheckpointOptions, Evaluation, RunOptions, StepOptions
  from distill_jax.train.prediction import predict
  from distill_jax.train.replay import with_replay
  from distill_jax.train.step import make_init, make_train_step
  from distill_jax.train.stopping import NonFiniteError

__all__ = [
  "CheckpointOptions",
  "Evaluation",
  "FitResult",
  "NonFiniteError",
  "RunOptions",
  "StepOptions",
  "evaluate",
  "evaluate_models",
  "evaluation_variables",
  "fit",
  "make_eval_step",
  "make_init",
  "make_loss_fn",
  "make_train_step",
  "params_ema",
  "predict",
  "with_replay",
]
