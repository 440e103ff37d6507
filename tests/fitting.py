"""Calls `fit` with the fields of its option groups by name: for tests that vary one of them at
a time.
"""

import dataclasses

from distill_jax.train import CheckpointOptions, Evaluation, RunOptions, StepOptions, fit

_EVALUATION = {"validation": "data", "eval_every": "every", "best": "best", "patience": "patience"}
_CHECKPOINTS = {"folder": "folder", "checkpoint_every": "every", "identity": "identity"}


def fit_with(*networks, **options):
  """Returns `fit(*networks, ...)`.

  `validation`, `eval_every`, `best` and `patience` make an `Evaluation`, `folder`,
  `checkpoint_every` and `identity` `CheckpointOptions`; fields of `StepOptions` and `RunOptions` go
  by their names. Without `validation` or `folder` there is no evaluation or checkpoint.
  """
  step = _take(options, [field.name for field in dataclasses.fields(StepOptions)])
  run = _take(options, [field.name for field in dataclasses.fields(RunOptions)])
  evaluation = _take(options, _EVALUATION)
  checkpoints = _take(options, _CHECKPOINTS)
  if evaluation.get("validation") is not None:
    named = {_EVALUATION[name]: value for name, value in evaluation.items()}
    options["evaluation"] = Evaluation(**named)
  if checkpoints.get("folder") is not None:
    named = {_CHECKPOINTS[name]: value for name, value in checkpoints.items()}
    options["checkpoints"] = CheckpointOptions(**named)
  run = RunOptions(**({"progress": False} | run))
  return fit(*networks, step=StepOptions(**step), run=run, **options)


def _take(options, names):
  return {name: options.pop(name) for name in list(names) if name in options}
