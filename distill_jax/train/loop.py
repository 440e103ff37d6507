"""The loop: batches in, steps, evaluations, checkpoints, a history out."""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from distill_jax import data
from distill_jax.cache import Cache
from distill_jax.cache.teacher.checks import check_weights
from distill_jax.distributed import hosts, sharding
from distill_jax.distributed.interruption import Interrupted, Interruption
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.train.inputs import (
  batches_of,
  check_classes,
  check_counts,
  check_kinds,
  check_validation,
  classes_of,
  data_identity,
  next_batch,
)
from distill_jax.train.log import Log, fetch
from distill_jax.train.placement import (
  compile_step,
  evaluator,
  init_on_host,
  place_teacher,
  sparsity_of,
)
from distill_jax.train.profile import Profile
from distill_jax.train.replay import Replay
from distill_jax.train.saver import Saver, student_of
from distill_jax.train.step import check_no_cached_outputs, make_init, make_train_step
from distill_jax.types import Batch, Model, Objective, OnPolicy, TrainState, Variables


class FitResult(NamedTuple):
  """What training leaves.

  Attributes:
    variables: the student's, from the best evaluation if there was a validation set, else the last.
    state: the train state after the last step.
    history: dicts as in metrics.jsonl, in order.
  """

  variables: Variables
  state: TrainState
  history: list[dict[str, Any]]


class NonFiniteError(RuntimeError):
  """Training was aborted after too many updates in a row that were not finite.

  Attributes:
    state: the last good train state; no update that was not finite has entered it.
  """

  def __init__(self, message: str, state: TrainState):
    super().__init__(message)
    self.state = state


def fit(
  student: Model,
  teacher: Model | Cache | None,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  source: data.Source | Callable[[int], Iterable[Mapping[str, Any]]],
  *,
  steps: int,
  batch_size: int,
  teacher_variables: Variables | None = None,
  validation: data.Source | Iterable[Mapping[str, Any]] | None = None,
  best: tuple[str, str] = ("accuracy", "max"),
  eval_every: int | None = None,
  log_every: int = 50,
  folder: str | Path | None = None,
  checkpoint_every: int | None = None,
  identity: Mapping[str, str | int | float] | None = None,
  seed: int = 0,
  num_views: int = 0,
  augment: Callable[[Batch], Batch] | None = None,
  mix: Callable[[jax.Array, Batch], Batch] | None = None,
  on_policy: OnPolicy | Replay | None = None,
  microbatches: int = 1,
  max_skips: int = 10,
  ignore_label: int | None = None,
  mesh: jax.sharding.Mesh | None = None,
  rules: sharding.Rules = (),
  teacher_rules: sharding.Rules = (),
  profile_steps: range | None = None,
  title: str = "train",
  progress: bool = True,
) -> FitResult:
  """Distills `teacher` into `student` (or trains the student alone: teacher None), on all devices of all hosts.

  Where several processes train together (`hosts.join`), each makes the same call.

  Args:
    student, teacher, objective, optimizer, augment, mix, on_policy, microbatches: as in `make_train_step`. A teacher
      may also be a `cache.Cache` of the same examples, augmentation and views: its outputs join the batches.
    source: the training examples; or your own pipeline, a function `start step -> iterable of batches` (dicts
      of host arrays of `batch_size` rows), which must give the same batches again to a run that resumes. Where
      several processes share a batch, it gives the rows that `sharding.local_rows` names, and so does a `validation`
      of batches.
    steps: in all, including those of an earlier run that is resumed.
    batch_size: rows per step over all devices.
    teacher_variables: the frozen teacher's weights, if the Model does not carry them.
    validation: examples for evaluation, never trained on; or an iterable of batches that can be gone through
      again and again, the last one filled up under 'where' (`data.stream.EvalStream`).
    best: the evaluation's score that chooses `FitResult.variables`, and 'max' or 'min'.
    eval_every: steps between evaluations; None: a tenth of `steps`. The last step is always evaluated.
    log_every: steps between reports; metrics stay on the device until then.
    folder: where checkpoints, metrics.jsonl, timings.jsonl and TensorBoard files go; the same one for all processes.
      The same call again resumes there, and ends with the parameters that an undisturbed run has. None: nothing is
      written. A run is known again by its
      data, seed, views, batch size and teacher; functions are not compared: put what else matters (the learning
      rate, a hash of your config) into `identity`.
    checkpoint_every: steps between checkpoints besides those at evaluations; None: only at evaluations.
    identity: what else must be equal for a run to be resumed, beside the data, seed, views and batch size.
    seed: of the student's initial weights, the order of the examples, and every draw.
    num_views: different augmented views per example; 0: a new one each epoch.
    max_skips: abort after this many updates in a row that were not finite.
    ignore_label: the label that marks examples without one in your own pipeline (a `Source` knows its own).
    mesh: `sharding.make_mesh(...)`; None: all devices along `data`.
    rules, teacher_rules: where the arrays of the train state, and of a live teacher, lie on the mesh
      (`sharding.Rules`).
      Without a rule what is large is spread over `fsdp`, and all else is on every device.
    profile_steps: the numbers of steps to be traced into `folder`/profile, for xprof.
    title, progress: a progress bar with this title on a terminal, a line per evaluation elsewhere.

  Returns:
    `FitResult`; its arrays lie as they did in training.

  Raises:
    ValueError: what does not fit: networks and their weights, objective, labels, batch and devices, arrays and rules,
      a folder of another run, or what other processes were given.
    NonFiniteError: see `max_skips`; the folder keeps its last checkpoint.
    RuntimeError: the frozen teacher's weights changed while it teacher_outputs.
    LeaseError: another process trains in the folder.
    Interrupted: SIGTERM came; the state was saved. Not caught, it ends the process with 143.
  """
  began = time.time()
  cached, teacher = (teacher, teacher.model) if isinstance(teacher, Cache) else (None, teacher)
  check_kinds(student, teacher, objective, source)
  check_counts(steps=steps, batch_size=batch_size, log_every=log_every, max_skips=max_skips)
  mesh = mesh or sharding.make_mesh()
  sharding.check_mesh(mesh)
  sharding.check_divisible(batch_size, mesh, microbatches=microbatches)
  here = sharding.local_rows(mesh, batch_size)
  rows = here if jax.process_count() > 1 else None
  eval_every = max(1, steps // 10) if eval_every is None else eval_every
  check_counts(eval_every=eval_every, checkpoint_every=checkpoint_every or eval_every)
  if cached is not None:
    num_views = num_views or cached.num_views
    if teacher_variables is not None:
      cached.check_weights(teacher_variables)
      teacher_variables = None
    shown = source if isinstance(source, data.Source) else next(iter(source(0)))
    cached.check(shown, augment=augment, num_views=getattr(source, "num_views", num_views), mix=mix)
  example = next(
    iter(batches_of(source, batch_size, seed, num_views, None, ignore_label, cached, rows)(0)), None
  )
  if example is None:
    raise ValueError("the source gives no batch")
  if on_policy is not None:
    check_no_cached_outputs(example)
  if rows is not None:
    example = {name: np.resize(x, (batch_size, *x.shape[1:])) for name, x in example.items()}
  if teacher_variables is not None and teacher is not None:
    check_weights(teacher, Variables(*teacher_variables), example)
  taught_by = place_teacher(
    teacher, teacher_variables, mesh, () if cached is not None else teacher_rules
  )
  teacher_fingerprint = fingerprint(taught_by)
  with init_on_host(mesh):
    init = make_init(student, teacher, objective, optimizer, on_policy=on_policy)
    state = init(jax.random.key(seed), example)
  classes = classes_of(student, state, example)
  check_classes(classes, source)
  stream = batches_of(source, batch_size, seed, num_views, classes, ignore_label, cached, rows)
  if validation is not None:
    check_validation(student, state, validation, batch_size, classes, best)
  placement = sharding.state_specs(state, mesh, rules)
  state = sharding.place(state, mesh, placement)
  step_fn = compile_step(
    make_train_step(
      student,
      teacher,
      objective,
      optimizer,
      microbatches=microbatches,
      augment=augment,
      mix=mix,
      on_policy=on_policy,
    ),
    mesh,
    placement,
  )
  evaluate = None
  if validation is not None:
    evaluate = evaluator(student, mesh, validation, batch_size, rows)
  identity = {
    "seed": seed,
    "num_views": num_views,
    "batch_size": batch_size,
    "teacher": teacher_fingerprint if cached is None else cached.digest,
    "data": data_identity(source),
    **(identity or {}),
  }
  if rows is not None:
    paces = {
      "steps": steps,
      "eval_every": eval_every,
      "log_every": log_every,
      "checkpoint_every": checkpoint_every,
    }
    hosts.assert_equal("run", {**identity, **paces, "start": fingerprint(state)})
  saver = Saver(folder, best, identity)
  first = hosts.is_first()
  with saver, Interruption() as interruption, Profile(saver.folder, profile_steps) as profile:
    state = saver.restore(state)
    start = int(state.step)
    kept = saver.folder if first else None
    with Log(
      kept, start=start, steps=steps, title=title, progress=progress and first, began=began
    ) as log:
      pending: list[Any] = []
      batches, waiting = iter(stream(start)), log.clock.waiting
      for step in range(start + 1, steps + 1):
        with waiting("data"):
          batch = next_batch(batches, step, batch_size, len(here))
          if rows is not None:
            batch = sharding.place_rows(batch, mesh, batch_size)
        state, measured = profile(step, step_fn, state, taught_by, batch)
        log.clock.stepped()
        pending.append(measured)
        stopping = interruption.at()
        evaluating = step % eval_every == 0 or step == steps
        saving = stopping or evaluating or step % (checkpoint_every or eval_every) == 0
        # What was not reported before a checkpoint would be missing from the report of a run that resumes there.
        if step % log_every == 0 or saving:
          with waiting("device"):
            values = fetch(pending)
          log.train(step, values, batch_size)
          pending.clear()
          _check_skips(state, max_skips)
        scores = None
        if evaluate is not None and evaluating:
          with waiting("evaluation"):
            scores = evaluate(student_of(state)) | sparsity_of(state)
          log.validation(step, scores)
        if saving:
          with waiting("checkpoint"):
            saver.save(state, scores)
        if stopping and step < steps:
          saver.wait()
          raise Interrupted(state)
      history = log.history
    if fingerprint(taught_by) != teacher_fingerprint:
      raise RuntimeError(
        "the teacher's weights changed while it teacher_outputs: a frozen teacher must not"
      )
    best_or_last = saver.best_variables(state) if validation is not None else student_of(state)
    return FitResult(best_or_last, state, history)


def _check_skips(state: TrainState, max_skips: int) -> None:
  skips = jax.device_get(state.skips)
  if skips.longest >= max_skips:
    raise NonFiniteError(
      f"{skips.longest} updates in a row were not finite (max_skips {max_skips}), {skips.total} in all, up to step "
      f"{int(state.step)}: the parameters are those from before. Look for NaN in the teacher's outputs, or lower "
      "the learning rate",
      state,
    )
