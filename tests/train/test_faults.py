"""Faults of a run that no other file shows; the numbers are rows of the project's table of
faults.
"""

import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_loop import assert_identical, linear, run, source
from test_saver import make_state

from distill_jax import data, losses, objectives
from distill_jax.distributed.interruption import Interrupted
from distill_jax.models import from_apply
from distill_jax.storage import seal, sealed_json
from distill_jax.storage.lease import LeaseError
from distill_jax.train import make_init, make_train_step
from distill_jax.train.saver import Saver
from distill_jax.types import Variables


def terminated_at(step, sent=signal.SIGTERM):
  """The pipeline of a run whose process gets a signal while it makes the batch of a step."""

  def batches(start):
    for number, batch in enumerate(data.batches(source(), 16, seed=0, start=start), start + 1):
      if number == step and start < step:
        os.kill(os.getpid(), sent)
      yield batch

  batches.identity = "toy"
  return batches


@pytest.mark.parametrize(
  "step", [8, *(pytest.param(n, marks=pytest.mark.nightly) for n in (10, 20))]
)
def test_sigterm_saves_the_step_and_resumes_to_the_same_bits(tmp_path, step):  # 57, 58
  before = signal.getsignal(signal.SIGTERM)
  whole = run(tmp_path / "whole", source=terminated_at(None))
  with pytest.raises(Interrupted) as raised:
    run(tmp_path / "parts", source=terminated_at(step))
  assert raised.value.code == 143
  newest = max(int(path.name) for path in (tmp_path / "parts" / "checkpoints").iterdir())
  assert newest == step
  assert signal.getsignal(signal.SIGTERM) == before
  resumed = run(tmp_path / "parts", source=terminated_at(None))
  assert_identical(whole.state, resumed.state)
  assert_identical(whole.variables, resumed.variables)
  # The same windows, too: that in which it was stopped has one line, for all of its steps.
  folders = [tmp_path / name for name in ("whole", "parts")]
  lines = [sealed_json.read_lines(folder / "metrics.jsonl") for folder in folders]
  assert [set(line) for line in lines[0]] == [set(line) for line in lines[1]]
  for expected, line in zip(*lines):
    assert (line["step"], line["phase"]) == (expected["step"], expected["phase"])
    np.testing.assert_allclose(line["loss"], expected["loss"], rtol=1e-12)


def test_ctrl_c_without_a_folder_returns_the_steps_so_far():
  # A process that was started in the background ignores Ctrl-C.
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  result = run(None, source=terminated_at(8, signal.SIGINT))
  assert int(result.state.step) == 8
  assert signal.signal(signal.SIGINT, old) is signal.default_int_handler


def test_float16_logits_of_any_size_keep_updates_finite():  # 17, 18
  def half(w, x):
    return (1000 * x.astype(jnp.float16)) @ w.astype(
      jnp.float16
    )  # products beyond float16's squares

  def whole(w, x):
    return half(w, x).astype(jnp.float32)

  def step_of(apply):
    weights = 8 * np.eye(4, 3, dtype=np.float32)
    student = from_apply(None, apply, variables=weights)
    teacher_outputs = from_apply(None, apply, variables=weights[:, ::-1].copy())
    objective = objectives.weighted(
      hard=(100.0, objectives.labels()),
      soft=(100.0, objectives.logits(losses.kl_divergence, temperature=1.0)),
    )
    batch = next(data.batches(source(), 16, seed=0))
    state = make_init(student, teacher_outputs, objective, optax.sgd(1e-6))(
      jax.random.key(0), batch
    )
    step = jax.jit(make_train_step(student, teacher_outputs, objective, optax.sgd(1e-6)))
    return step(state, Variables(*teacher_outputs.variables), batch)

  (state, measured), (expected, told) = step_of(half), step_of(whole)
  assert int(state.skips.total) == 0
  total, count = jax.device_get(measured["loss"])
  assert (
    np.isfinite(total / count) and total / count > np.finfo(np.float16).max
  )  # float16 would be infinite
  np.testing.assert_allclose(total, told["loss"][0], rtol=1e-6)
  assert state.params["student"].dtype == jnp.float32
  np.testing.assert_allclose(
    state.params["student"], expected.params["student"], rtol=1e-3, atol=1e-3
  )


def test_a_donated_state_is_refused():  # 27
  student = linear()
  objective = objectives.weighted(hard=(1.0, objectives.labels()))
  batch = next(data.batches(source(), 16, seed=0))
  state = make_init(student, None, objective, optax.adam(0.1))(jax.random.key(0), batch)
  step = jax.jit(make_train_step(student, None, objective, optax.adam(0.1)), donate_argnums=0)
  step(state, (), batch)
  with pytest.raises((RuntimeError, ValueError), match="deleted|donated"):
    jax.block_until_ready(step(state, (), batch))


def test_second_trainer_leaves_unfinished_files_alone(tmp_path):  # 49, 50
  with Saver(tmp_path, ("accuracy", "max"), {}) as saver:
    saver.save(make_state(1), None)  # by then it has cleared what killed runs left
    unfinished = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with pytest.raises(LeaseError, match="belongs to process"):
      run(tmp_path)
    assert unfinished.exists()
  with Saver(tmp_path, ("accuracy", "max"), {}) as saver:
    saver.save(make_state(2), None)
  assert not unfinished.exists()


def test_changed_data_position_is_corrupt():  # 55: it follows from the step, which is sealed
  state = run(steps=2).state
  sealed = seal.make_seal(state, {}, {})["seal"]
  with pytest.raises(seal.CorruptFile, match=r"1 of .* leaves .*: step"):
    seal.check_contents(sealed, state._replace(step=state.step + 1))


@pytest.mark.skipif(
  not Path("/proc/self/task").exists(), reason="asks Linux for the children of a process"
)
def test_training_has_no_processes_that_could_outlive_it(tmp_path):  # 60
  seen = []

  def children():
    return [
      pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()
    ]

  def watched(start):
    for batch in data.batches(source(), 16, seed=0, start=start):
      seen.append(children())
      yield batch

  before = children()
  run(tmp_path, source=watched, steps=5)
  assert seen and all(now == before for now in seen)
