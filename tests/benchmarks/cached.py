"""Times training from a cache / without a teacher, through `fit`, by turns in two threads."""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from unittest import mock

import jax.numpy as jnp
import numpy as np
import optax
from problems import DISTILLED, SUPERVISED, Problem
from timing import Ratio

from distill_jax import data, losses, objectives
from distill_jax.cache import Cache, Dense, TopK, write_cache
from distill_jax.data import Source
from distill_jax.models import from_apply, from_nnx
from distill_jax.models.zoo.mlp import MLP
from distill_jax.train import RunOptions, fit
from distill_jax.types import Model, Objective

EVERY = 50
"""Steps of a turn, after which `fit` reports and so waits for the device."""


def dense_to_baseline(problem: Problem, pairs: int) -> Ratio:
  """Times a cache of 10 classes in float16."""
  with tempfile.TemporaryDirectory() as folder:
    cache = write_cache(
      folder, problem.teacher, problem.source, {"logits": Dense()}, progress=False
    )
    return _compare(problem.student, problem.source, problem.batch_size, cache, DISTILLED, pairs)


def maps_to_baseline(problem: Problem, pairs: int, *, shrink: int = 1) -> Ratio:
  """Times a cache of label maps' logits in float16, of which ignored pixels do not count.

  Args:
    problem, pairs: as for the others.
    shrink: how many times fewer rows and columns are stored.
  """
  objective = objectives.weighted(
    hard=(0.1, objectives.labels(ignore_label=255)),
    soft=(0.9, objectives.logits(losses.kl_divergence, temperature=4.0, ignore_label=255)),
  )
  height, width = problem.source.arrays["label"].shape[1:]
  size = None if shrink == 1 else (height // shrink, width // shrink)
  with tempfile.TemporaryDirectory() as folder:
    codecs = {"logits": Dense(size=size)}
    cache = write_cache(
      folder, problem.teacher, problem.source, codecs, batch_size=problem.batch_size, progress=False
    )
    return _compare(problem.student, problem.source, problem.batch_size, cache, objective, pairs)


def top_k_to_baseline(problem: Problem, pairs: int) -> Ratio:
  """Times a cache of the 64 most probable of 32,000 classes, the outputs of a perceptron."""
  classes, k = (40, 4) if len(problem.source.arrays["image"][0]) < 28 else (32_000, 64)
  arrays = {**problem.source.arrays, "label": problem.source.arrays["label"] * (classes // 10)}
  source = Source(arrays, classes, name="random images")
  pixels = int(np.prod(source.arrays["image"].shape[1:]))
  student = from_nnx(lambda rngs: MLP(pixels, (64,), classes, rngs=rngs))
  kernel = jnp.asarray(np.random.default_rng(2).normal(size=(pixels, classes)), jnp.float32)
  teacher = from_apply(None, lambda w, x: (x.reshape(len(x), -1) @ w, {}), variables=kernel)
  objective = objectives.weighted(
    hard=(0.1, objectives.labels()), soft=(0.9, objectives.sparse(losses.sparse_kl))
  )
  with tempfile.TemporaryDirectory() as folder:
    cache = write_cache(folder, teacher, source, {"logits": TopK(k)}, progress=False)
    return _compare(student, source, problem.batch_size, cache, objective, pairs)


def _compare(
  student: Model, source: Source, batch_size: int, cache: Cache, objective: Objective, pairs: int
) -> Ratio:
  def run(teacher, objective):
    fit(
      student,
      teacher,
      objective,
      optax.adam(1e-3),
      source,
      steps=EVERY * (pairs + 2) + 1,
      batch_size=batch_size,
      run=RunOptions(log_every=EVERY, progress=False),
    )

  return by_turns(lambda: run(cache, objective), lambda: run(None, SUPERVISED))


def by_turns(ours: Callable[[], None], theirs: Callable[[], None], every: int = EVERY) -> Ratio:
  """Runs two loops over `data.batches` by turns of `every` batches, and times the turns.

  The first turn of each, which compiles, and the last one are not counted.
  """
  times: Ratio = Ratio([], [])
  turn = threading.Condition()
  original_batches = data.batches
  state = {"whose": 0, "done": [False, False], "error": None}

  def wait(side: int) -> None:
    with turn:
      turn.wait_for(lambda: state["whose"] == side or state["done"][1 - side])

  def hand_over(side: int) -> None:
    with turn:
      state["whose"] = 1 - side
      turn.notify_all()

  def timed(side: int, batches: Iterator) -> Iterator:
    start = None
    for count, batch in enumerate(batches):
      if count % every == 0:
        if count > every:
          times[side].append((time.perf_counter() - start) / every)
        if count:
          hand_over(side)
          wait(side)
        start = time.perf_counter()
      yield batch

  def loop(side: int, run: Callable[[], None]) -> None:
    wait(side)
    local.side = side
    try:
      run()
    except BaseException as error:
      state["error"] = error
    finally:
      with turn:
        state["done"][side] = True
        state["whose"] = 1 - side
        turn.notify_all()

  local = threading.local()

  def batches(*args, **kwargs):
    iterator = original_batches(*args, **kwargs)
    local.calls = getattr(local, "calls", 0) + 1
    # `fit` takes the first iterator only for the shapes of a batch.
    return iterator if local.calls == 1 else timed(local.side, iterator)

  with mock.patch.object(data, "batches", batches):
    threads = [
      threading.Thread(target=loop, args=(side, run)) for side, run in enumerate((ours, theirs))
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  if state["error"] is not None:
    raise state["error"]
  shorter = min(map(len, times))
  return Ratio(times.ours[:shorter], times.theirs[:shorter])
