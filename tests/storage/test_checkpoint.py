"""Checkpoints come back bit for bit or not at all, whatever is corrupt, full, killed or renamed."""

import contextlib
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from states import assert_identical, detects_flip, flip, make_state, save_steps

from distill_jax.storage import seal, serialization
from distill_jax.storage.checkpoint import Checkpoints
from distill_jax.types import Skips, TrainState


@pytest.fixture(scope="module", autouse=True)
def frozen_garbage():
  """Lets `gc.collect` look only at what this module's tests create: it then takes milliseconds."""
  gc.collect()
  gc.freeze()
  yield
  gc.unfreeze()


@pytest.fixture
def settled():
  yield
  time.sleep(0.2)
  gc.collect()


def orbax_gives_up(test):
  """Marks a test in which Orbax fails; it leaves futures that Python reports later."""
  unraisable = "ignore::pytest.PytestUnraisableExceptionWarning"
  coroutine = "ignore:coroutine .* was never awaited:RuntimeWarning"
  return pytest.mark.usefixtures("settled")(pytest.mark.filterwarnings(unraisable, coroutine)(test))


def damage(checkpoint, state):
  """Flips one bit of a stored leaf."""
  table = np.asarray(state.params["student"]["table"]).tobytes()
  files = [file for file in checkpoint.rglob("*") if file.is_file() and table in file.read_bytes()]
  assert files
  for file in files:
    flip(file, file.read_bytes().index(table) + 5, 3)


def names(folder):
  return sorted(path.name for path in folder.iterdir() if "orbax" not in path.name)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
  """A folder with checkpoints 1 and 2."""
  return save_steps(tmp_path_factory.mktemp("template") / "run", 1, 2)


@pytest.fixture
def saved(template, tmp_path):
  """A copy of `template` for a test to change."""
  return Path(shutil.copytree(template, tmp_path / "saved"))


def test_leaves_come_back_bit_for_bit(tmp_path):
  state = make_state(7)
  with Checkpoints(tmp_path / "run") as checkpoints:
    assert checkpoints.restore(state) is None
    checkpoints.save(state)
    assert_identical(checkpoints.restore(make_state(0, seed=5)), state)
  abstract = jax.eval_shape(lambda: make_state(0))
  assert_identical(Checkpoints(tmp_path / "run", read_only=True).restore(abstract), state)


def test_latest_and_best_stay_across_restarts(tmp_path):
  scores = {1: 0.5, 2: 0.9, 3: float("nan"), 4: 0.8, 5: float("inf"), 6: 0.7, 7: 0.1}
  best = ("accuracy", "max")
  for steps in ((1, 2, 3), (4, 5, 6, 7)):
    with Checkpoints(tmp_path, best=best) as checkpoints:
      checkpoints.restore(make_state())
      for step in steps:
        metrics = {"accuracy": scores[step], "loss": -scores[step]}
        checkpoints.save(make_state(step, seed=step), metrics=metrics, notes={"of": [step]})
  with Checkpoints(tmp_path, best=best) as checkpoints:
    assert checkpoints.steps() == [2, 6, 7]
    assert checkpoints.best_step == 2
    notes = {step: seal["notes"] for step, seal in checkpoints.seals().items()}
    assert notes == {2: {"of": [2]}, 6: {"of": [6]}, 7: {"of": [7]}}
    for step, expected in (("best", 2), (None, 7), (6, 6)):
      state = checkpoints.restore(make_state(), step=step)
      assert_identical(state, make_state(expected, seed=expected))
  assert names(tmp_path) == ["2", "6", "7"]
  assert Checkpoints(tmp_path, best=("loss", "min"), read_only=True).best_step == 2
  with pytest.raises(ValueError, match=r"best: .*typo"):
    Checkpoints(tmp_path, best=("typo", "min"), read_only=True).restore(make_state(), step="best")


def test_of_equal_metrics_the_lower_loss_stays_then_the_later_step(tmp_path):
  with Checkpoints(tmp_path, keep=1, best=("error", "min")) as checkpoints:
    for step, error, nll in ((1, 2.0, 0.1), (2, 1.0, 0.3), (3, 1.0, 0.2), (4, 1, 0.2), (5, 1, 0.9)):
      checkpoints.save(make_state(step), metrics={"error": error, "nll": nll})
    assert (checkpoints.best_step, checkpoints.steps()) == (4, [4, 5])


@pytest.mark.parametrize("placement", ["one", "sharded", "replicated"])
def test_state_may_be_donated_right_after_save(tmp_path, mesh, placement):
  update = jax.jit(
    lambda s: s._replace(step=s.step + 1, params=jax.tree.map(lambda x: x + 1, s.params)),
    donate_argnums=0,
  )
  # An aliased buffer cannot be donated.
  zero, *zeros = (jnp.array(0, jnp.int32) for _ in range(4))
  weights = {f"w{i}": jnp.full((256, 512), i, jnp.float32) for i in range(4)}
  state = TrainState(
    zero, jax.random.key(0), {"student": weights, "objective": {}}, {}, (), (), Skips(*zeros)
  )
  if placement != "one":
    spec = PartitionSpec("data") if placement == "sharded" else PartitionSpec()
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    state = state._replace(params=jax.device_put(state.params, NamedSharding(mesh, spec)))
  with Checkpoints(tmp_path, keep=20) as checkpoints:
    for _ in range(4):
      checkpoints.save(state)
      for _ in range(3):
        state = update(state)
    assert checkpoints.steps() == [0, 3, 6, 9]
    for step in checkpoints.steps():
      student = checkpoints.restore(state, step=step).params["student"]
      for i in range(4):
        np.testing.assert_array_equal(student[f"w{i}"], step + i)


def test_restore_uses_the_shardings_of_like(tmp_path, mesh):
  state = make_state(3)
  kernel = NamedSharding(mesh, PartitionSpec(None, "data"))
  sharded = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
  dense = sharded.params["student"]["dense"]
  dense["kernel"] = jax.device_put(dense["kernel"], kernel)
  with Checkpoints(tmp_path / "one") as one, Checkpoints(tmp_path / "eight") as eight:
    one.save(state)
    eight.save(sharded)
    to_eight = one.restore(sharded)
    to_one = eight.restore(state)
  assert_identical(to_eight, state)
  assert_identical(to_one, state)
  assert to_eight.params["student"]["dense"]["kernel"].sharding == kernel
  assert len(to_one.params["student"]["dense"]["kernel"].devices()) == 1


def test_relative_folder_is_resolved_at_once(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with Checkpoints("run") as checkpoints:
    monkeypatch.chdir("/")
    checkpoints.save(make_state(1))
  assert Checkpoints(tmp_path / "run", read_only=True).steps() == [1]


def test_file_instead_of_folder_raises(tmp_path):
  file = tmp_path / "file"
  file.touch()
  for folder in (file, file / "below"):
    with pytest.raises(OSError, match=rf"folder: .*{folder}"):
      Checkpoints(folder)


def test_read_only_directory_raises():
  folder = Path(tempfile.mkdtemp())
  folder.chmod(0o555)
  # Permissions do not stop root.
  root = os.geteuid() == 0
  try:
    if root:
      os.seteuid(65534)
    with pytest.raises(OSError, match=rf"folder: .*{folder}.*Permission"):
      Checkpoints(folder)
  finally:
    if root:
      os.seteuid(0)
    folder.rmdir()


@pytest.mark.parametrize(
  "options",
  [{"keep": 0}, {"best": ("loss", "minimum")}, {"folder": "gs://bucket/run"}],
  ids=lambda options: next(iter(options)),
)
def test_bad_arguments_raise(tmp_path, options):
  ((field, value),) = options.items()
  with pytest.raises(ValueError, match=rf"{field}: .*minimum|{field}: .*{value}"):
    Checkpoints(**{"folder": tmp_path, **options})


@contextlib.contextmanager
def full_disk():
  """Lets writes beyond the first 300 bytes of a file fail."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@orbax_gives_up
@pytest.mark.parametrize("surfaces_in", ["save", "close", "wait"])
def test_full_disk_raises_and_older_checkpoints_stay(saved, surfaces_in):
  checkpoints = Checkpoints(saved, keep=1)
  # Made before the disk is full, as a compilation writes to the shared cache of programs.
  states = [make_state(3), make_state(4)]
  with full_disk(), pytest.raises(RuntimeError, match=r"checkpoint 3 of .*\[1, 2\]"):
    checkpoints.save(states[0])
    if surfaces_in == "save":
      checkpoints.save(states[1])
    checkpoints.close() if surfaces_in == "close" else checkpoints.wait()
  if surfaces_in != "close":
    assert checkpoints.steps() == [1, 2]
    assert_identical(checkpoints.restore(make_state()), make_state(2, seed=2))
    checkpoints.save(make_state(3))
    checkpoints.close()
    assert Checkpoints(saved, read_only=True).steps() == [3]


@orbax_gives_up
def test_full_disk_during_replacement_keeps_the_old_one(saved):
  other = make_state(2, seed=9)
  with Checkpoints(saved, keep=1) as checkpoints:
    with full_disk(), pytest.raises(RuntimeError, match=r"checkpoint 2 of .*\[1, 2\]"):
      checkpoints.save(other)
      checkpoints.wait()
    assert_identical(checkpoints.restore(make_state()), make_state(2, seed=2))
  assert names(saved) == ["1", "2"]


@orbax_gives_up
def test_flipped_bits_are_detected_or_harmless(saved, rng, flips=24):
  files = [f for f in (saved / "2").rglob("*") if f.is_file() and f.stat().st_size]
  states = {step: make_state(step, seed=step) for step in (1, 2)}
  reader = Checkpoints(saved, read_only=True)
  detections = 0
  for i in range(flips):
    file = files[i % len(files)]
    position = int(rng.integers(file.stat().st_size)), int(rng.integers(8))
    detections += detects_flip(reader, saved / "2", states, file, position)
  assert detections > flips / 4


@orbax_gives_up
@pytest.mark.nightly
def test_2000_flipped_bits_are_detected_or_harmless(saved, rng):
  test_flipped_bits_are_detected_or_harmless(saved, rng, flips=2000)


@orbax_gives_up
@pytest.mark.parametrize("fraction", [0, 0.5])
def test_truncated_files_are_detected(saved, fraction):
  reader = Checkpoints(saved, read_only=True)
  state = make_state()
  patterns = ["_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "state/d/*"]
  for file in [file for pattern in patterns for file in (saved / "2").glob(pattern)]:
    content = file.read_bytes()
    file.write_bytes(content[: int(fraction * len(content))])
    with pytest.warns(RuntimeWarning, match=str(saved / "2")):
      assert_identical(reader.restore(state), make_state(1, seed=1))
    file.write_bytes(content)
  assert_identical(reader.restore(state), make_state(2, seed=2))


@pytest.mark.parametrize("step", [1, 2])
def test_flipped_metadata_is_skipped_by_a_writer(saved, step):
  """Also where Orbax' own reader of the file raises."""
  file = saved / str(step) / "_CHECKPOINT_METADATA"
  content = file.read_bytes()
  keys = [b"item_handlers", b"performance_metrics", b"custom_metadata", b"digest", b"{"]
  for key in keys:
    file.write_bytes(content)
    flip(file, content.index(key), 1)
    with Checkpoints(saved) as checkpoints, warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always", RuntimeWarning)
      assert int(checkpoints.restore(make_state()).step) == (1 if step == 2 and caught else 2)
    if key not in keys[:2]:  # Those two are Orbax' own: its arrays can be read without them.
      assert checkpoints.steps() == [3 - step]
      assert len(caught) == (step == 2)
  with pytest.warns(RuntimeWarning) if step == 2 else contextlib.nullcontext():
    with Checkpoints(saved, keep=3) as checkpoints:
      checkpoints.restore(make_state())
      checkpoints.save(make_state(3))
      assert checkpoints.steps() == [3 - step, 3]


def test_saving_leaves_no_threads_and_open_files(tmp_path):
  def counts():
    return np.array([threading.active_count(), len(os.listdir("/proc/self/fd"))])

  state = make_state()
  with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
    checkpoints.save(state)
    checkpoints.wait()
    before = counts()
    for step in range(1, 13):
      checkpoints.save(state._replace(step=state.step + step))
    checkpoints.wait()
    # Threads of earlier tests may end meanwhile.
    assert (counts() <= before).all()


def test_states_may_differ_in_empty_nodes(template):
  like = make_state()
  like = like._replace(opt_state=(*like.opt_state, optax.EmptyState(), {}))
  state = Checkpoints(template, read_only=True).restore(like)
  assert jax.tree.structure(state) == jax.tree.structure(like)
  expected = make_state(2, seed=2)
  assert_identical(state._replace(opt_state=expected.opt_state), expected)


@pytest.mark.parametrize(
  "error",
  [
    PermissionError(13, "denied"),
    OSError(24, "Too many open files"),
    ValueError("RESOURCE_EXHAUSTED: Failed to open"),
    NotImplementedError("no such kernel"),
  ],
  ids=lambda error: type(error).__name__,
)
def test_errors_of_the_machine_are_not_corruption(template, monkeypatch, error):
  def fail(*_):
    raise KeyError("as Orbax raises it") from error

  reader = Checkpoints(template, read_only=True)
  monkeypatch.setattr(serialization.ocp, "load_checkpointables", fail)
  with pytest.raises(type(error), match=str(error.args[-1])):
    reader.restore(make_state())
  monkeypatch.undo()
  assert int(reader.restore(make_state()).step) == 2


@orbax_gives_up
def test_shardings_that_do_not_fit_are_not_corruption(template, mesh):
  like = make_state()
  spec = NamedSharding(mesh, PartitionSpec("data"))
  abstract = jax.eval_shape(lambda: like)
  student = abstract.params["student"]
  student["mask"] = jax.ShapeDtypeStruct((5,), bool, sharding=spec)
  with pytest.raises(ValueError, match="evenly divide"):
    Checkpoints(template, read_only=True).restore(abstract)


def test_changed_settings_are_said_and_flags_explain_other_leaves(tmp_path):
  save_steps(tmp_path, 1, settings={"rate": "0.1", "enable_x64": "False"})
  reader = Checkpoints(tmp_path, read_only=True, settings={"rate": "0.2", "enable_x64": "False"})
  with pytest.warns(RuntimeWarning, match=r"rate: 0.1 .* 0.2 now$"):
    reader.restore(make_state())
  reader = Checkpoints(tmp_path, read_only=True, settings={"rate": "0.1", "enable_x64": "True"})
  with pytest.raises(ValueError, match=r"differs: step .*\n  enable_x64: False .* True now$"):
    reader.restore(make_state()._replace(step=jnp.zeros(2)))


def test_empty_and_renamed_directories_are_skipped(saved):
  (saved / "2").rename(saved / "8")
  (saved / "9").mkdir()
  with Checkpoints(saved) as checkpoints:
    assert checkpoints.steps() == [1]
    with pytest.warns(RuntimeWarning) as caught:
      assert_identical(checkpoints.restore(make_state()), make_state(1, seed=1))
    first, second = (str(warning.message) for warning in caught)
    assert str(saved / "9") in first
    assert str(saved / "8") in second and "step: expected 8, got 2" in second
    checkpoints.save(make_state(5))
    assert checkpoints.steps() == [1, 5]
  assert names(saved) == ["1", "5"]


@orbax_gives_up
def test_all_checkpoints_corrupt_never_starts_from_scratch(saved):
  for step in (1, 2):
    damage(saved / str(step), make_state(step, seed=step))
  (saved / "3").mkdir()
  with Checkpoints(saved) as checkpoints, pytest.warns(RuntimeWarning):
    with pytest.raises(RuntimeError, match=r"(?s)folder: none of the 3.*1: .*2: .*3: "):
      checkpoints.restore(make_state())
  assert {"1", "2"} <= set(names(saved))


@orbax_gives_up
def test_corrupt_best_is_skipped_and_written_again(tmp_path):
  options = {"keep": 3, "best": ("a", "max")}
  with Checkpoints(tmp_path, **options) as checkpoints:
    for step, score in ((1, 0.5), (2, 0.4), (3, 0.9)):
      checkpoints.save(make_state(step, seed=step), metrics={"a": score})
  damage(tmp_path / "3", make_state(3, seed=3))
  with Checkpoints(tmp_path, **options) as checkpoints:
    with pytest.warns(RuntimeWarning, match=r"params/student/table"):
      assert_identical(checkpoints.restore(make_state(), step="best"), make_state(1, seed=1))
    assert checkpoints.best_step == 1
    checkpoints.save(make_state(3, seed=3), metrics={"a": 0.9})
    assert_identical(checkpoints.restore(make_state()), make_state(3, seed=3))
    assert (checkpoints.best_step, checkpoints.steps()) == (3, [1, 2, 3])


def test_changed_seal_warns_since_it_may_have_been_the_best(tmp_path):
  with Checkpoints(tmp_path, best=("a", "max")) as checkpoints:
    checkpoints.save(make_state(1, seed=1), metrics={"a": 0.5})
    checkpoints.save(make_state(2), metrics={"a": 0.9})
  metadata = tmp_path / "2" / "_CHECKPOINT_METADATA"
  metadata.write_text(metadata.read_text().replace("0.9", "0.8"))
  reader = Checkpoints(tmp_path, best=("a", "max"), read_only=True)
  with pytest.warns(RuntimeWarning, match=r"2: digest"):
    assert_identical(reader.restore(make_state(), step="best"), make_state(1, seed=1))


def test_same_bits_in_another_dtype_or_shape_are_corrupt():
  state = make_state(1)
  sealed = seal.make_seal(state, {}, {})["seal"]
  seal.check_contents(sealed, state)
  student = state.params["student"]
  narrow = {**student, "mask": student["mask"].astype(jnp.uint8)}
  for name, corrupt in {
    "key": state._replace(key=jax.random.key_data(state.key)),
    "step": state._replace(step=state.step[None]),
    "params/student/mask": state._replace(params={**state.params, "student": narrow}),
  }.items():
    with pytest.raises(seal.CorruptFile, match=rf"1 of .*: {name}$"):
      seal.check_contents(sealed, corrupt)


def test_every_mismatched_leaf_has_a_line(template):
  like = make_state()
  student = like.params["student"]
  student["dense"]["kernel"] = student["dense"]["kernel"].astype(jnp.float16)
  student["extra"] = jnp.zeros(2)
  student["layers"][3] = jnp.zeros((2, 2), jnp.float16)
  del student["mask"]
  like = like._replace(key=jax.random.key(0, impl="rbg"))
  with pytest.raises(ValueError) as error:
    Checkpoints(template, read_only=True).restore(like)
  first, *lines = str(error.value).splitlines()
  assert str(template / "2") in first
  assert lines == [
    "  missing: params/student/extra float32[2]",
    "  unexpected: params/student/mask bool[5]",
    "  differs: key is key<fry>[], expected key<rbg>[]",
    "  differs: params/student/dense/kernel is float32[4,8], expected float16[4,8]",
    "  differs: params/student/layers/3 is float16[2], expected float16[2,2]",
  ]


def test_another_run_raises_with_every_difference(tmp_path):
  identity = {"data_seed": 0, "config": "a1", "rate": 0.1}
  save_steps(tmp_path, 1, identity=identity)
  other = {"data_seed": 1, "config": "a1", "width": 2}
  with pytest.raises(ValueError) as error:
    Checkpoints(tmp_path, identity=other).restore(make_state())
  assert [line.split(":")[0] for line in str(error.value).splitlines()[1:]] == [
    "  data_seed",
    "  rate",
    "  width",
  ]
  assert Checkpoints(tmp_path, identity=identity).restore(make_state())
  assert Checkpoints(tmp_path, read_only=True).restore(make_state())


def test_wrong_folder_shows_where_checkpoints_are(tmp_path):
  run = save_steps(tmp_path / "run" / "student", 10, 20)
  hint = rf"folder: .*{run} \(steps \[10, 20\]\)"
  with pytest.raises(FileNotFoundError, match=hint):
    Checkpoints(tmp_path / "run" / "studnet", read_only=True)
  for parent in (tmp_path, tmp_path / "run"):
    with pytest.raises(ValueError, match=hint):
      Checkpoints(parent).restore(make_state())
  with pytest.raises(ValueError, match=rf"folder: .*open {run}$"):
    Checkpoints(run / "10", read_only=True).restore(make_state())
  with pytest.raises(ValueError, match=r"folder: .* 15 .*\[10, 20\]"):
    Checkpoints(run, read_only=True).restore(make_state(), step=15)


def test_saving_a_stored_step_again(tmp_path):
  with Checkpoints(tmp_path, keep=1, best=("a", "max")) as checkpoints:
    checkpoints.save(make_state(4))
    checkpoints.wait()
    modified = (tmp_path / "4").stat().st_mtime_ns
    checkpoints.save(make_state(4))
    checkpoints.wait()
    assert (tmp_path / "4").stat().st_mtime_ns == modified
    checkpoints.save(make_state(4), metrics={"a": 1}, notes={"save": 1})
    assert (checkpoints.best_step, checkpoints.seals()[4]["notes"]) == (4, {"save": 1})
    checkpoints.save(make_state(4, seed=9), metrics={"a": 2}, notes={"save": 2})
    assert checkpoints.seals()[4]["notes"] == {"save": 2}
    assert_identical(checkpoints.restore(make_state()), make_state(4, seed=9))
    with pytest.raises(ValueError, match=r"step 3 .* 4 "):
      checkpoints.save(make_state(3))
  assert names(tmp_path) == ["4"]


def test_killed_during_replacement_the_old_one_is_back(saved):
  (saved / "2").rename(saved / "2.replaced")
  reader = Checkpoints(saved, read_only=True)
  assert reader.steps() == [1, 2]
  assert_identical(reader.restore(make_state()), make_state(2, seed=2))
  assert names(saved) == ["1", "2.replaced"]
  with Checkpoints(saved) as checkpoints:
    assert_identical(checkpoints.restore(make_state()), make_state(2, seed=2))


def test_replaced_step_counts_until_the_new_one_is_complete(saved, tmp_path):
  with Checkpoints(tmp_path / "new") as checkpoints:
    checkpoints.save(make_state(2, seed=9))
  (saved / "2").rename(saved / "2.replaced")
  (tmp_path / "new" / "2").rename(saved / "2")
  reader = Checkpoints(saved, read_only=True)
  assert reader.steps() == [1, 2]
  assert_identical(reader.restore(make_state()), make_state(2, seed=2))
  with Checkpoints(saved) as checkpoints:
    assert_identical(checkpoints.restore(make_state()), make_state(2, seed=2))
    checkpoints.save(make_state(5))
  assert names(saved) == ["2", "5"]


@pytest.mark.parametrize("step", [2, 3])
def test_checkpoint_without_a_seal_replaces_none(saved, monkeypatch, step):
  """Orbax writes such a checkpoint if it cannot read its own metadata for a moment."""
  start_save = serialization.start_save
  with Checkpoints(saved, keep=1) as checkpoints:
    monkeypatch.setattr(
      serialization,
      "start_save",
      lambda path, state, _: start_save(path, state, {}),
    )
    checkpoints.save(make_state(step, seed=9))
    with pytest.raises(RuntimeError, match=rf"checkpoint {step} of .*\[1, 2\]"):
      checkpoints.wait()
    assert_identical(checkpoints.restore(make_state()), make_state(2, seed=2))
    monkeypatch.undo()
    checkpoints.save(make_state(4))
  assert names(saved) == ["4"]


def test_only_a_writer_removes_what_killed_runs_left(saved):
  temporary = saved / "7.orbax-checkpoint-tmp"
  garbage = saved / "6-0123.removed"
  for folder in (temporary, garbage):
    folder.mkdir()
    (folder / "data").touch()
  reader = Checkpoints(saved, read_only=True)
  assert_identical(reader.restore(make_state()), make_state(2, seed=2))
  assert temporary.exists() and garbage.exists()
  with pytest.raises(ValueError, match=r"folder"):
    reader.save(make_state(3))
  with Checkpoints(saved) as checkpoints:
    checkpoints.save(make_state(3))
  assert not temporary.exists() and not garbage.exists()
  assert reader.steps() == [2, 3]


@pytest.mark.parametrize(
  "leaf, name",
  [
    (np.zeros(2), "average"),
    (1.0, "average"),
    (jnp.asarray(1.0), "average"),
    ({"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}}, "average/a/b"),
  ],
  ids=["numpy", "float", "weak", "name"],
)
def test_leaves_that_would_change_raise(tmp_path, leaf, name):
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=rf"^{name}: "):
    checkpoints.save(make_state()._replace(average=leaf))


CHILD = """
import sys
sys.path.insert(0, sys.argv[2])
from states import Checkpoints, assert_identical, make_state
with Checkpoints(sys.argv[1]) as checkpoints:
  state = checkpoints.restore(make_state())
  step = 0 if state is None else int(state.step)
  if step:
    assert_identical(state, make_state(step, seed=step))
  print("restored", step, flush=True)
  while True:
    step += 1
    checkpoints.save(make_state(step, seed=step))
    print("began", step, flush=True)
"""


def test_killed_during_save_restores_the_step_before(tmp_path, rng, kills=1):
  """SIGKILL at random moments of a run that does nothing but save."""
  folder = tmp_path / "run"
  step = 1
  for _ in range(kills):
    command = [sys.executable, "-c", CHILD, str(folder), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
      lines = [child.stdout.readline()]
      # `began n` is printed after checkpoint n - 1 is complete.
      assert lines[0].startswith("restored") and int(lines[0].split()[1]) >= step - 1, (lines, step)
      for _ in range(int(rng.integers(1, 6))):
        lines.append(child.stdout.readline())
      time.sleep(float(rng.uniform(0, 0.1)))
      child.send_signal(signal.SIGKILL)
      lines += child.stdout.read().splitlines()
    step = max(int(line.split()[1]) for line in lines if line.startswith("began"))
  with Checkpoints(folder) as checkpoints:
    state = checkpoints.restore(make_state())
  assert int(state.step) >= step - 1
  assert_identical(state, make_state(int(state.step), seed=int(state.step)))


@pytest.mark.nightly
def test_killed_50_times_during_save(tmp_path, rng):
  test_killed_during_save_restores_the_step_before(tmp_path, rng, kills=50)
