"""The loop: batches in; steps, evaluations and checkpoints; a history out."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import optax

from distill_jax import data
from distill_jax.cache import Cache
from distill_jax.distributed import hosts
from distill_jax.distributed.interruption import Interruption
from distill_jax.errors import check_integer
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.teachers.host_function import raising_host_errors
from distill_jax.train.arguments import Arguments, Run, check_length, check_options
from distill_jax.train.batch_errors import name_shapes
from distill_jax.train.inputs import next_batch
from distill_jax.train.log import Log
from distill_jax.train.options import (
  CheckpointOptions,
  Evaluation,
  RunOptions,
  StepOptions,
)
from distill_jax.train.placement import sparsity
from distill_jax.train.prepare import prepare
from distill_jax.train.profile import Profile
from distill_jax.train.result import FitResult
from distill_jax.train.saver import Saver, all_variables
from distill_jax.train.stopping import Patience, check_skips
from distill_jax.train.window import Window
from distill_jax.types import Batch, Objective, Task, TrainState


class _Due(NamedTuple):
  """What is done after a step."""

  report: bool
  evaluate: bool
  save: bool
  stop: bool


@raising_host_errors()
def fit(
  student: Any,
  teacher: Any,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  source: Any,
  *,
  steps: int | None = None,
  epochs: int | None = None,
  batch_size: int,
  seed: int = 0,
  student_variables: Any = None,
  teacher_variables: Any = None,
  task: Task | None = None,
  evaluation: Any = None,
  checkpoints: CheckpointOptions | str | Path | None = None,
  step: StepOptions = StepOptions(),  # noqa: B008 (frozen)
  run: RunOptions = RunOptions(),  # noqa: B008 (frozen)
) -> FitResult:
  """Distills `teacher` into `student` on all devices of all hosts.

  Where several processes train together (`hosts.join`), each makes the same call.

  Args:
    student: a Model, or a network as it is: a Flax NNX module, a Keras model, an Equinox module, a
      Haiku transform, a Linen module or `(Linen module, variables)`. It takes the batch's only
      input (not 'id', 'label', ...), or those with the names of its arguments; else call its
      adapter in `models`. It starts from its weights, which are copied: those of the result are in
      `variables`.
    teacher: the same; a `cache.Cache` of the same examples, augmentation and views, whose outputs
      join the batches; or None, to train the student without a teacher.
    objective, optimizer: as in `make_train_step`.
    source: the training examples: a `Source`, a dict of arrays, or anything that yields batches
      (dicts of arrays of `batch_size` rows), such as a list, a loader or a function `start step ->
      iterable of batches`; see `data.from_iterable`, which also names the items of tuples. A
      shorter batch is filled up under 'where'; only batch norm's statistics see the added rows.
      Images that the student reads are floats: uint8 raises, and floats of 0 to 255 and channels
      first warn.
      Where several processes share a batch, each yields the rows that `sharding.local_rows` names,
      and so do the batches of an evaluation.
    steps: in all, including those of an earlier run that is resumed.
    epochs: in place of `steps`: passes over the source. One of a `Source` or a stream of N examples
      has N // batch_size steps: the rows that do not fill a batch are left out, others in each
      epoch. One of a list or a loader has as many steps as batches.
    batch_size: rows per step over all devices.
    seed: of the student's initial weights, the order of the examples, and every draw.
    student_variables: the weights that the student starts from: `Variables`, Linen's `{'params':
      ..., 'batch_stats': ...}`, or the params alone of a network without state; None: those of its
      `init`. They are copied.
    teacher_variables: the frozen teacher's weights in the same forms, if the Model does not carry
      them.
    task: what is measured in training and evaluation. None: it is inferred from outputs and labels
      where that is safe (`tasks.infer`), and otherwise the objective's own terms are evaluated, for
      which the teacher runs too. Metrics that compare with the teacher are left out: `evaluate`
      computes them.
    evaluation: validation examples, of the same types as `source` and readable again and again, or
      an `Evaluation` of them.
    checkpoints: the run's folder, or `CheckpointOptions`. The same call again resumes there, and
      ends with the parameters that an undisturbed run has. None: nothing is written.
    step: see `StepOptions`.
    run: see `RunOptions`.

  Returns:
    A `FitResult`; its arrays are placed as in training.

  Raises:
    ValueError: what does not fit: networks and their weights, objective, labels, batch and devices,
      arrays and rules, a folder of another run, or what other processes were given.
    NonFiniteError: see `RunOptions.max_skips`; the folder keeps its last checkpoint.
    RuntimeError: the frozen teacher's weights changed during training.
    LeaseError: another process trains in the folder.
    Interrupted: SIGTERM or Ctrl-C came; the state was saved. Not caught, it ends the process with
      143 or 130. Ctrl-C without a folder raises nothing: the result of the steps so far is
      returned.

  >>> import jax.numpy as jnp
  >>> import numpy as np
  >>> import optax
  >>> from distill_jax import data, losses, models, objectives
  >>> from distill_jax.train import fit
  >>> arrays = {"x": np.eye(8, dtype=np.float32), "label": np.arange(8)}
  >>> source = data.Source(arrays, classes=8)
  >>> linear = lambda w, x: x @ w
  >>> teacher = models.from_apply(None, linear, variables=3 * jnp.eye(8), inputs="x")
  >>> student = models.from_apply(lambda key, x: jnp.zeros((8, 8)), linear, inputs="x")
  >>> objective = objectives.weighted(soft=(1.0, objectives.logits(losses.kl_divergence)))
  >>> result = fit(student, teacher, objective, optax.adam(0.1), source, steps=20, batch_size=8)
  >>> result.predict({"x": np.eye(8, dtype=np.float32)})["logits"].argmax(-1)
  array([0, 1, 2, 3, 4, 5, 6, 7])
  """
  began = time.time()
  check_options(task, step, run)
  cache, model = (teacher, teacher.model) if isinstance(teacher, Cache) else (None, teacher)
  if evaluation is not None and not isinstance(evaluation, Evaluation):
    evaluation = Evaluation(evaluation)
  if checkpoints is not None and not isinstance(checkpoints, CheckpointOptions):
    checkpoints = CheckpointOptions(checkpoints)
  arguments = Arguments(
    student=student,
    teacher=model,
    cache=cache,
    objective=objective,
    optimizer=optimizer,
    source=source,
    steps=check_length(steps, epochs),
    epochs=epochs,
    batch_size=check_integer("batch_size", batch_size, 1),
    seed=check_integer("seed", seed),
    student_variables=student_variables,
    teacher_variables=teacher_variables,
    task=task,
    evaluation=evaluation,
    checkpoints=checkpoints,
    step=step,
    run=run,
  )
  return _run(arguments, began)


def _run(arguments: Arguments, began: float) -> FitResult:
  """Prepares, restores, trains, and returns the result."""
  run, state = prepare(arguments)
  options, checkpoints = run.arguments.run, run.arguments.checkpoints
  folder = None if checkpoints is None else checkpoints.folder
  first = hosts.is_first()
  with (
    Saver(folder, (run.best.name, run.best.better), run.identity, run.settings) as saver,
    Interruption() as interruption,
    Profile(saver.folder, options.profile_steps) as profile,
  ):
    state = saver.restore(state)
    patience = Patience(run.best, _patience_limit(run), saver.notes)
    _check_done(int(state.step), run.intervals.steps)
    if options.progress and first and not patience.stop_reason():
      _print_resumed(saver.folder, int(state.step), run.intervals.steps)
    with Log(
      saver.folder if first else None,
      start=int(state.step),
      steps=run.intervals.steps,
      title=options.title,
      progress=options.progress and first,
      main=run.best.name,
      began=began,
      evaluations=saver.scores(),
      callbacks=options.callbacks if first else (),
    ) as log:
      state, stop_reason = _train(run, state, saver, interruption, profile, log, patience)
      if stop_reason:
        log.stopped(int(state.step), stop_reason)
      log.warn_of_constant(run.best.name)
    if fingerprint(run.teacher_variables) != run.teacher_fingerprint:
      raise RuntimeError(
        "teacher_variables: expected frozen weights, got others after training: copy them before "
        "you change them"
      )
    best_step = None
    if run.evaluate is None:
      variables, learned = all_variables(state)
    else:
      variables, learned, best_step = saver.best_variables(state)
    return FitResult(
      run.arguments.student,
      variables,
      state,
      log.history,
      run.task,
      run.best,
      learned,
      best_step,
      stop_reason,
    )


def _check_done(done: int, steps: int) -> None:
  if done > steps:
    raise ValueError(
      f"steps: expected at least the {done} that the run in this folder has done, got {steps}: "
      f"pass steps={done} to get its result, or another folder"
    )


def _print_resumed(folder: Path | None, done: int, steps: int) -> None:
  if done == steps:
    print(f"nothing to train: {folder} holds all {steps} steps", flush=True)
  elif done:
    print(f"resuming {folder} after step {done} of {steps}", flush=True)


def _train(
  run: Run,
  state: TrainState,
  saver: Saver,
  interruption: Interruption,
  profile: Profile,
  log: Log,
  patience: Patience,
) -> tuple[TrainState, str]:
  """Returns the state after the last step, and why it came before the last of all; or ''."""
  first_step = int(state.step) + 1
  source = run.arguments.source
  pipeline = source if isinstance(source, data.Pipeline) else None
  if pipeline is not None:
    pipeline.set_state(saver.position(first_step - 1))
  batches = iter(run.stream(first_step - 1))
  window = Window(saver.notes)
  stop_reason = _stop_reason(patience)
  for step in range(first_step, run.intervals.steps + 1):
    if stop_reason:
      break
    with log.clock.waiting("data"):
      batch = next_batch(batches, step, run.arguments.batch_size, run.num_rows)
      batch = run.place(batch)
    with name_shapes(f"source: batch {step - 1}, counted from 0", batch, run.example):
      state, step_metrics = profile(step, run.step_fn, state, run.teacher_variables, batch)
    log.clock.stepped()
    window.add(step_metrics)
    due = _due(run, step, stop=interruption.at())
    if due.report:
      _report(run, log, step, state, window, batch)
    scores = None
    if due.evaluate:
      scores = _evaluate(run, log, step, state)
      patience.update(step, scores)
    if due.save:
      with log.clock.waiting("checkpoint"):
        position = None if pipeline is None else pipeline.get_state()
        notes = patience.notes() | ({} if due.report else window.notes())
        saver.save(state, scores, position, notes)
    if due.stop and step < run.intervals.steps:
      saver.wait()
      log.stop(step)
      interruption.answer(state, saved=saver.folder is not None)
      stop_reason = "Ctrl-C"
    elif due.evaluate:
      stop_reason = _stop_reason(patience)
  return state, "" if int(state.step) == run.intervals.steps else stop_reason


def _due(run: Run, step: int, *, stop: bool) -> _Due:
  intervals = run.intervals
  is_interval = step % intervals.evaluate == 0 or step == intervals.steps
  save = is_interval or step % intervals.save == 0
  evaluate = is_interval and run.evaluate is not None
  has_folder = run.arguments.checkpoints is not None
  # What was not reported before a checkpoint would be missing from the report of a run that resumes
  # there; after a signal, the checkpoint has it.
  ends = step == intervals.steps or (stop and not has_folder)
  report = (save and has_folder) or evaluate or step % run.arguments.run.log_every == 0 or ends
  return _Due(report, evaluate, save or stop, stop)


def _report(run: Run, log: Log, step: int, state: TrainState, window: Window, batch: Batch) -> None:
  """Reports the metrics of the steps since the last report, and clears them."""
  with log.clock.waiting("device"):
    sums = window.take()
  log.train(step, sums, run.arguments.batch_size)
  check_skips(run.arguments, state, run.teacher_variables, batch)


def _evaluate(run: Run, log: Log, step: int, state: TrainState) -> dict[str, float]:
  assert run.evaluate is not None
  with log.clock.waiting("evaluation"):
    scores = run.evaluate(state) | sparsity(state)
  log.validation(step, scores)
  return scores


def _patience_limit(run: Run) -> int | None:
  evaluation = run.arguments.evaluation
  return None if evaluation is None else evaluation.patience


def _stop_reason(patience: Patience) -> str:
  """Returns why training stops now, the same on all processes; '' while it goes on."""
  return hosts.run_on_first(patience.stop_reason)
