"""A run that resumes says what it resumes and what differs; no valid checkpoint is corrupt."""

import os
import shutil
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fitting import fit_with

from distill_jax import losses, objectives
from distill_jax.train import CheckpointOptions, Evaluation, RunOptions
from distill_jax.train.arguments import Intervals
from distill_jax.train.batch_checks import Checks
from distill_jax.train.resume_identity import process_settings
from distill_jax.train.saver import Saver
from distill_jax.types import Metric, Model, Variables

HARD = (1.0, objectives.labels())
SOFT = (1.0, objectives.logits(losses.kl_divergence, temperature=2.0))
BOTH = objectives.weighted(hard=HARD, soft=SOFT)


def linear():
  def apply(params, state, batch, *, train, key):
    return {"logits": batch["image"] @ params["w"]}, state

  return Model(lambda key, batch: Variables({"w": jax.random.normal(key, (4, 3))}, {}), apply)


def run(folder, objective=BOTH, optimizer=None, *, steps=2, progress=False, **kwargs):
  images = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
  return fit_with(
    linear(),
    linear(),
    objective,
    optimizer or optax.adam(1e-3),
    [{"image": images, "label": np.arange(8) % 3}] * 3,
    teacher_variables=Variables({"w": jnp.ones((4, 3))}, {}),
    steps=steps,
    batch_size=8,
    folder=folder,
    progress=progress,
    **kwargs,
  )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("finished") / "run"
  run(folder)
  return folder


@pytest.mark.parametrize(
  "objective, optimizer, field",
  [
    (objectives.weighted(soft=SOFT), optax.adam(1e-3), "terms: hard, soft .* soft now"),
    (objectives.weighted(hard=HARD, soft=SOFT, more=SOFT), optax.adam(1e-3), "terms: hard, soft "),
    (objectives.weighted(hard=HARD, mild=SOFT), optax.adam(1e-3), "terms: .* hard, mild now"),
    (BOTH, optax.adamw(1e-3), "optimizer: .* add_decayed_weights"),
    (BOTH, optax.sgd(1e-3), "optimizer: scale_by_adam"),
  ],
  ids=["fewer", "more", "renamed", "adamw", "sgd"],
)
def test_another_objective_or_optimizer_is_named(finished, objective, optimizer, field):
  with pytest.raises(ValueError, match=rf"\n  {field}"):
    run(finished, objective, optimizer)
  assert int(run(finished).state.step) == 2


@pytest.mark.parametrize(
  "objective, optimizer, field",
  [
    (objectives.weighted(hard=HARD, soft=(0.5, SOFT[1])), optax.adam(1e-3), "objective.*soft: 1.0"),
    (BOTH, optax.adam(1e-2), "optimizer.*: -0.001"),
  ],
  ids=["weight", "rate"],
)
def test_changed_hyperparameters_are_said_in_one_line(finished, objective, optimizer, field):
  with pytest.warns(RuntimeWarning, match=rf"under other settings.*: {field}.*now$") as caught:
    run(finished, objective, optimizer)
  assert len(caught) == 1


def test_changed_hyperparameters_are_said_once_where_the_best_weights_are_read_too(tmp_path):
  image = np.eye(4, dtype=np.float32)
  evaluation = [{"image": image, "label": np.arange(4) % 3}]

  def resume(rate, steps=3):
    run(tmp_path, optimizer=optax.adam(rate), steps=steps, validation=evaluation, eval_every=2)

  resume(1e-3)
  with pytest.warns(RuntimeWarning, match="under other settings") as caught:
    resume(1e-2)
  assert len(caught) == 1


def test_changed_temperature_and_flags_are_said(finished, tmp_path):
  folder = shutil.copytree(finished, tmp_path / "run")
  soft = (1.0, objectives.logits(losses.kl_divergence, temperature=4.0))
  partitionable = jax.config.jax_threefry_partitionable
  with jax.threefry_partitionable(not partitionable):
    with pytest.warns(RuntimeWarning, match=r"threefry_partitionable: .*temperature: 2.0 .* 4.0"):
      assert int(run(folder, objectives.weighted(hard=HARD, soft=soft)).state.step) == 2


def test_what_is_resumed_is_said(finished, tmp_path, capsys):
  folder = shutil.copytree(finished, tmp_path / "run")
  run(folder, steps=3, progress=True)
  assert f"resuming {folder} after step 2 of 3\n" in capsys.readouterr().out
  run(folder, steps=3, progress=True)
  assert f"nothing to train: {folder} holds all 3 steps\n" in capsys.readouterr().out
  with pytest.raises(ValueError, match="^steps: .* 3 .* 1"):
    run(folder, steps=1)


@pytest.mark.parametrize("below", ["checkpoints", "checkpoints/2", "checkpoints/2/state"])
def test_a_folder_inside_a_run_is_noticed(finished, below):
  before = sorted(path for path in finished.rglob("*"))
  with pytest.raises(ValueError, match=rf"checkpoints: .*{finished}$"):
    run(finished / below)
  assert sorted(finished.rglob("*")) == before


def test_runs_leave_no_threads_and_open_files(tmp_path, finished):
  state = run(finished).state

  def save_twice(i):
    with Saver(tmp_path / str(i % 2), ("loss", "min"), {}) as saver:
      saver.restore(state)
      saver.save(state, None)

  def counts():
    return threading.active_count(), len(os.listdir("/proc/self/fd"))

  save_twice(0)
  before = counts()
  for i in range(10):
    save_twice(i)
  assert counts() == before


@pytest.mark.parametrize(
  ("field", "change"),
  [
    ("max_skips", {"run": RunOptions(max_skips=3)}),
    ("patience", {"evaluation": Evaluation([], patience=2)}),
    ("checkpoints", {"checkpoints": CheckpointOptions("run")}),
    ("rules", {"run": RunOptions(rules=[("w$", jax.sharding.PartitionSpec("data"))])}),
    ("evaluate", {}),
  ],
)
def test_processes_compare_what_decides_their_computations(mesh, field, change):
  settings = [process_settings_with(mesh, **options) for options in ({}, change)]
  if field == "evaluate":
    settings[1] = process_settings_with(mesh, every=2)
  assert {name for name in settings[0] if settings[0][name] != settings[1][name]} == {field}


def process_settings_with(mesh, every=1, **options):
  given = {"run": RunOptions(), "evaluation": Evaluation([]), "checkpoints": None, **options}
  metric = Metric("accuracy", "accuracy")
  return process_settings(
    SimpleNamespace(**given),
    SimpleNamespace(mesh=mesh, example={"image": np.zeros((2, 3), np.float32)}),
    {"w": jnp.zeros(2)},
    SimpleNamespace(best=metric, evaluated=SimpleNamespace(metrics=[metric]), checks=Checks({})),
    Intervals(10, every, 1),
  )
