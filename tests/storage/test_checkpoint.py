import gc
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.storage import seal
from distill_jax.storage.checkpoint import Checkpoints
from distill_jax.trees import named_leaves
from distill_jax.types import Skips, TrainState, Variables


def make_state(step=0, seed=0, width=3):
  def normal(i, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape).astype(dtype)

  student = {
    "dense": {
      "kernel": normal(0, (4, width)),
      "bias": normal(1, (width,), jnp.bfloat16),
      "none": {},
    },
    "layers": [normal(i, (2,), jnp.float16) for i in range(12)],
    "mask": normal(2, (5,)) > 0,
    "table": normal(4, (64, 16)),
  }
  params = {"student": student, "objective": {"projection": normal(3, (width, 2))}}
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  trained = {
    "student": {"dense": {"kernel": student["dense"]["kernel"]}},
    "objective": params["objective"],
  }
  zero = jnp.zeros((), jnp.int32)
  return TrainState(
    step=jnp.array(step, jnp.int32),
    key=jax.random.key(seed + 1),
    params=params,
    model_state={"student": {"dropout": jax.random.split(jax.random.key(7), 2)}, "objective": ()},
    opt_state=optimizer.init(trained),
    average=Variables(student, ()),
    skips=Skips(zero, zero + 1, zero + 2),
  )


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (name, x), (_, y) in zip(named_leaves(a), named_leaves(b)):
    assert (x.dtype, x.shape) == (y.dtype, y.shape), name
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def saved(folder, *steps, **options):
  """A folder with checkpoints of these steps, each with its own values."""
  with Checkpoints(folder, keep=len(steps), **options) as checkpoints:
    for step in steps:
      checkpoints.save(make_state(step, seed=step))
  return folder


def flip(file, byte, bit):
  content = bytearray(file.read_bytes())
  content[byte] ^= 1 << bit
  file.write_bytes(content)


def damage(checkpoint, state):
  """Flip one bit of a stored leaf."""
  table = np.asarray(state.params["student"]["table"]).tobytes()
  files = [file for file in checkpoint.rglob("*") if file.is_file() and table in file.read_bytes()]
  assert files
  for file in files:
    flip(file, file.read_bytes().index(table) + 5, 3)


@pytest.fixture
def settled():
  yield
  time.sleep(0.2)
  gc.collect()


def orbax_gives_up(test):
  """Where it fails Orbax leaves futures and coroutines behind, which Python reports when it collects them."""
  unraisable = "ignore::pytest.PytestUnraisableExceptionWarning"
  test = pytest.mark.filterwarnings(
    unraisable, "ignore:coroutine .* was never awaited:RuntimeWarning"
  )(test)
  return pytest.mark.usefixtures("settled")(test)


def test_every_leaf_comes_back_bit_for_bit(tmp_path):
  state = make_state(7)
  with Checkpoints(tmp_path / "run") as checkpoints:
    assert checkpoints.restore(state) is None
    checkpoints.save(state)
    same(checkpoints.restore(make_state(0, seed=5)), state)
  abstract = jax.eval_shape(lambda: make_state(0))
  same(Checkpoints(tmp_path / "run", read_only=True).restore(abstract), state)


def test_the_latest_and_the_best_stay_also_across_restarts(tmp_path):
  scores = {1: 0.5, 2: 0.9, 3: float("nan"), 4: 0.9, 5: float("inf"), 6: 0.7, 7: 0.1}
  for step, score in scores.items():
    with Checkpoints(tmp_path, best=("accuracy", "max")) as checkpoints:
      checkpoints.restore(make_state())
      checkpoints.save(make_state(step, seed=step), metrics={"accuracy": score, "loss": -score})
  with Checkpoints(tmp_path, best=("accuracy", "max")) as checkpoints:
    assert checkpoints.steps() == [2, 6, 7]
    assert checkpoints.best_step == 2
    assert checkpoints.best_metrics == {"accuracy": 0.9, "loss": -0.9}
    same(checkpoints.restore(make_state(), step="best"), make_state(2, seed=2))
    same(checkpoints.restore(make_state()), make_state(7, seed=7))
    same(checkpoints.restore(make_state(), step=6), make_state(6, seed=6))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "6", "7"]
  assert Checkpoints(tmp_path, best=("loss", "min"), read_only=True).best_step == 2
  with pytest.raises(ValueError, match="finite value of best=.*typo"):
    Checkpoints(tmp_path, best=("typo", "min"), read_only=True).restore(make_state(), step="best")


def test_equal_metrics_keep_the_earlier_and_min_is_the_smallest(tmp_path):
  with Checkpoints(tmp_path, keep=1, best=("loss", "min")) as checkpoints:
    for step, loss in ((1, 2.0), (2, 1.0), (3, 1.0), (4, 3.0)):
      checkpoints.save(make_state(step), metrics={"loss": loss})
    assert (checkpoints.best_step, checkpoints.steps()) == (2, [2, 4])


@pytest.mark.parametrize("placement", ["one", "sharded", "replicated"])
def test_the_state_may_be_donated_right_after_save(tmp_path, mesh, placement):
  update = jax.jit(
    lambda s: s._replace(step=s.step + 1, params=jax.tree.map(lambda x: x + 1, s.params)),
    donate_argnums=0,
  )
  zero, *zeros = (jnp.array(0, jnp.int32) for _ in range(4))  # an aliased buffer cannot be donated
  params = {
    "student": {f"w{i}": jnp.full((256, 512), i, jnp.float32) for i in range(4)},
    "objective": {},
  }
  state = TrainState(zero, jax.random.key(0), params, {}, (), (), Skips(*zeros))
  if placement != "one":
    spec = PartitionSpec("data") if placement == "sharded" else PartitionSpec()
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    state = state._replace(params=jax.device_put(state.params, NamedSharding(mesh, spec)))
  with Checkpoints(tmp_path, keep=20) as checkpoints:
    for _ in range(6):
      checkpoints.save(state)
      for _ in range(3):
        state = update(state)
    for step in checkpoints.steps():
      for i in range(4):
        restored = checkpoints.restore(state, step=step)
        np.testing.assert_array_equal(restored.params["student"][f"w{i}"], step + i)
    assert len(checkpoints.steps()) == 6


def test_restores_into_the_shardings_of_like(tmp_path, mesh):
  state = make_state(3, width=8)
  kernel = NamedSharding(mesh, PartitionSpec(None, "data"))
  spread = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
  spread.params["student"]["dense"]["kernel"] = jax.device_put(
    state.params["student"]["dense"]["kernel"], kernel
  )
  with Checkpoints(tmp_path / "one") as one, Checkpoints(tmp_path / "eight") as eight:
    one.save(state)
    eight.save(spread)
    to_eight, to_one = one.restore(spread), eight.restore(state)
  same(to_eight, state)
  same(to_one, state)
  assert to_eight.params["student"]["dense"]["kernel"].sharding == kernel
  assert len(to_one.params["student"]["dense"]["kernel"].devices()) == 1


def test_a_relative_folder_is_resolved_at_once(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with Checkpoints("run") as checkpoints:
    monkeypatch.chdir("/")
    checkpoints.save(make_state(1))
  assert Checkpoints(tmp_path / "run", read_only=True).steps() == [1]


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path):
  file = tmp_path / "file"
  file.touch()
  for folder in (file, file / "below"):
    with pytest.raises(OSError, match=f"checkpoint folder {folder} cannot be written"):
      Checkpoints(folder)


def test_a_read_only_directory_is_refused_at_the_start():
  folder = Path(tempfile.mkdtemp())
  folder.chmod(0o555)
  root = os.geteuid() == 0
  try:
    if root:  # whom permissions do not stop
      os.seteuid(65534)
    with pytest.raises(OSError, match=f"checkpoint folder {folder} cannot be written.*Permission"):
      Checkpoints(folder)
  finally:
    if root:
      os.seteuid(0)
    folder.rmdir()


@pytest.mark.parametrize(
  "options, message",
  [
    ({"keep": 0}, "keep must be at least 1, got 0"),
    ({"best": ("loss", "minimum")}, "best must be .*'minimum'"),
    ({"folder": "gs://bucket/run"}, "folder must be .*gs://bucket/run"),
  ],
)
def test_bad_arguments(tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    Checkpoints(**{"folder": tmp_path, **options})


@contextmanager
def full_disk():
  """Bytes beyond the first 300 of a file cannot be written."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@orbax_gives_up
@pytest.mark.parametrize("surfaces_in", ["save", "close", "wait"])
def test_a_full_disk_is_reported_and_the_older_checkpoints_stay(tmp_path, surfaces_in):
  saved(tmp_path, 1)
  checkpoints = Checkpoints(tmp_path, keep=1)
  not_written = r"checkpoint 2 of .* was not written \(still there: \[1\]\)"
  with full_disk(), pytest.raises(RuntimeError, match=not_written):
    checkpoints.save(make_state(2))
    if surfaces_in == "save":
      checkpoints.save(make_state(3))
    checkpoints.close() if surfaces_in == "close" else checkpoints.wait()
  if surfaces_in != "close":
    assert checkpoints.steps() == [1]
    same(checkpoints.restore(make_state()), make_state(1, seed=1))
    checkpoints.save(make_state(2))
    checkpoints.close()
    assert Checkpoints(tmp_path, read_only=True).steps() == [2]


@orbax_gives_up
def test_a_full_disk_while_a_step_is_replaced_leaves_the_old_one(tmp_path):
  saved(tmp_path, 1)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    with full_disk(), pytest.raises(RuntimeError, match=r"still there: \[1\]"):
      checkpoints.save(make_state(1, seed=9))
      checkpoints.wait()
    same(checkpoints.restore(make_state()), make_state(1, seed=1))
  assert [p.name for p in tmp_path.iterdir() if "orbax" not in p.name] == ["1"]


@orbax_gives_up
def test_of_one_flipped_bit_nothing_wrong_is_restored(tmp_path, rng, flips=60):
  saved(tmp_path, 1, 2)
  files = [f for f in (tmp_path / "2").rglob("*") if f.is_file() and f.stat().st_size]
  states = {step: make_state(step, seed=step) for step in (1, 2)}
  reader, fell_back = Checkpoints(tmp_path, read_only=True), 0
  for i in range(flips):
    file = files[i % len(files)]
    at = int(rng.integers(file.stat().st_size)), int(rng.integers(8))
    flip(file, *at)
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always", RuntimeWarning)
      state = reader.restore(states[1])
    step = int(state.step)
    same(state, states[step])
    assert any("is damaged and is skipped" in str(w.message) for w in caught) == (step == 1), (
      file,
      at,
    )
    fell_back += step == 1
    flip(file, *at)
  assert fell_back > flips / 4


@orbax_gives_up
@pytest.mark.slow
def test_of_2000_flipped_bits_nothing_wrong_is_restored(tmp_path, rng):
  test_of_one_flipped_bit_nothing_wrong_is_restored(tmp_path, rng, flips=2000)


@orbax_gives_up
@pytest.mark.parametrize("size", [0, 0.5])
def test_truncated_files_are_noticed(tmp_path, size):
  saved(tmp_path, 1, 2)
  reader, state = Checkpoints(tmp_path, read_only=True), make_state()
  names = ["_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "state/d/*"]
  for file in [file for name in names for file in (tmp_path / "2").glob(name)]:
    content = file.read_bytes()
    file.write_bytes(content[: int(size * len(content))])
    with pytest.warns(RuntimeWarning, match="checkpoint .*2 is damaged and is skipped"):
      same(reader.restore(state), make_state(1, seed=1))
    file.write_bytes(content)
  same(reader.restore(state), make_state(2, seed=2))


def test_empty_and_renamed_step_directories_are_skipped_and_make_way(tmp_path):
  saved(tmp_path, 1, 2)
  (tmp_path / "2").rename(tmp_path / "8")
  (tmp_path / "9").mkdir()
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [1]
    with pytest.warns(RuntimeWarning) as caught:
      same(checkpoints.restore(make_state()), make_state(1, seed=1))
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2 and "9 is damaged" in texts[0] and "8 is damaged" in texts[1]
    assert "its seal says step 2: the directory was renamed" in texts[1]
    checkpoints.save(make_state(5))
    assert checkpoints.steps() == [1, 5]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "5"]


@orbax_gives_up
def test_every_checkpoint_damaged_never_starts_over(tmp_path):
  saved(tmp_path, 1, 2)
  for step in (1, 2):
    damage(tmp_path / str(step), make_state(step, seed=step))
  (tmp_path / "3").mkdir()
  with Checkpoints(tmp_path) as checkpoints:
    with (
      pytest.warns(RuntimeWarning),
      pytest.raises(RuntimeError, match="(?s)no sound checkpoint.*1: .*2: .*3: "),
    ):
      checkpoints.restore(make_state())
  assert {"1", "2"} <= {p.name for p in tmp_path.iterdir()}


@orbax_gives_up
def test_a_damaged_step_is_written_again_and_the_best_falls_to_the_next(tmp_path):
  with Checkpoints(tmp_path, keep=3, best=("a", "max")) as checkpoints:
    for step, a in ((1, 0.5), (2, 0.4), (3, 0.9)):
      checkpoints.save(make_state(step, seed=step), metrics={"a": a})
  damage(tmp_path / "3", make_state(3, seed=3))
  with Checkpoints(tmp_path, keep=3, best=("a", "max")) as checkpoints:
    with pytest.warns(RuntimeWarning, match="leaves are not what was saved"):
      same(checkpoints.restore(make_state(), step="best"), make_state(1, seed=1))
    assert checkpoints.best_step == 1
    checkpoints.save(make_state(3, seed=3), metrics={"a": 0.9})
    same(checkpoints.restore(make_state()), make_state(3, seed=3))
    assert (checkpoints.best_step, checkpoints.steps()) == (3, [1, 2, 3])


def test_a_broken_seal_may_have_been_the_best_and_is_mentioned(tmp_path):
  with Checkpoints(tmp_path, best=("a", "max")) as checkpoints:
    checkpoints.save(make_state(1, seed=1), metrics={"a": 0.5})
    checkpoints.save(make_state(2), metrics={"a": 0.9})
  metadata = tmp_path / "2" / "_CHECKPOINT_METADATA"
  metadata.write_text(metadata.read_text().replace("0.9", "0.8"))
  reader = Checkpoints(tmp_path, best=("a", "max"), read_only=True)
  with pytest.warns(RuntimeWarning, match="2 is damaged and is skipped: its seal is broken"):
    same(reader.restore(make_state(), step="best"), make_state(1, seed=1))


def test_the_right_bits_in_another_dtype_or_shape_are_damage():
  state = make_state(1)
  sealed = seal.make(state, {}, {})["seal"]
  seal.check_contents(sealed, state)
  mask = state.params["student"]["mask"]
  for broken in (
    state._replace(key=jax.random.key_data(state.key)),
    state._replace(step=state.step[None]),
    state._replace(
      params={
        **state.params,
        "student": {**state.params["student"], "mask": mask.astype(jnp.uint8)},
      }
    ),
  ):
    with pytest.raises(seal.CorruptFile, match="1 of .* leaves are not what was saved"):
      seal.check_contents(sealed, broken)


def test_another_dtype_shape_or_key_is_refused_leaf_by_leaf(tmp_path):
  saved(tmp_path, 1)
  like = make_state()
  student = like.params["student"]
  student["dense"]["kernel"] = student["dense"]["kernel"].astype(jnp.float16)
  student["extra"] = jnp.zeros(2)
  student["layers"][3] = jnp.zeros((2, 2), jnp.float16)
  del student["mask"]
  with pytest.raises(ValueError) as error:
    Checkpoints(tmp_path, read_only=True).restore(like)
  text = str(error.value)
  assert f"checkpoint {tmp_path / '1'} cannot be used" in text
  assert "differs: params/student/dense/kernel is float32[4,3], expected float16[4,3]" in text
  assert "differs: params/student/layers/3 is float16[2], expected float16[2,2]" in text
  assert "missing: params/student/extra float32[2]" in text
  assert "unexpected: params/student/mask bool[5]" in text
  # `average` holds the same dict, so each leaf is listed twice; nothing else is.
  assert text.count("\n") == 8


def test_another_kind_of_key_is_refused(tmp_path):
  saved(tmp_path, 1)
  like = make_state()._replace(key=jax.random.key(0, impl="rbg"))
  with pytest.raises(ValueError, match=r"differs: key is key<fry>\[\], expected key<rbg>\[\]"):
    Checkpoints(tmp_path, read_only=True).restore(like)


def test_another_run_is_refused(tmp_path):
  saved(tmp_path, 1, identity={"data_seed": 0, "config": "a1", "rate": 0.1})
  with pytest.raises(ValueError) as error:
    Checkpoints(tmp_path, identity={"data_seed": 1, "config": "a1", "width": 2}).restore(
      make_state()
    )
  text = str(error.value)
  assert "data_seed: 0 when it was saved, 1 now" in text
  assert "rate: 0.1 when it was saved, '(not given)' now" in text
  assert (
    "width: '(not given)' when it was saved, 2 now" in text
    and "config" not in text.split("saved it:")[1]
  )
  assert Checkpoints(tmp_path, identity={"data_seed": 0, "config": "a1", "rate": 0.1}).restore(
    make_state()
  )
  assert Checkpoints(tmp_path, read_only=True).restore(make_state())


def test_wrong_paths_say_where_the_checkpoints_are(tmp_path):
  run = saved(tmp_path / "run" / "student", 10, 20)
  found = rf"{run} \(steps \[10, 20\]\)"
  with pytest.raises(
    FileNotFoundError, match=f"no checkpoint folder .*/studnet; there are checkpoints in {found}"
  ):
    Checkpoints(tmp_path / "run" / "studnet", read_only=True)
  for parent in (tmp_path, tmp_path / "run"):
    with pytest.raises(
      ValueError, match=f"no checkpoint in {parent}; .*there are checkpoints in {found}"
    ):
      Checkpoints(parent).restore(make_state())
  with pytest.raises(ValueError, match=f"it is a checkpoint itself, open {run}"):
    Checkpoints(run / "10", read_only=True).restore(make_state())
  with pytest.raises(ValueError, match=r"no checkpoint of step 15 in .*; found steps \[10, 20\]"):
    Checkpoints(run, read_only=True).restore(make_state(), step=15)


def test_a_step_that_is_there_already(tmp_path):
  with Checkpoints(tmp_path, keep=1, best=("a", "max")) as checkpoints:
    checkpoints.save(make_state(4))
    checkpoints.wait()
    written = (tmp_path / "4").stat().st_mtime_ns
    checkpoints.save(make_state(4))
    checkpoints.wait()
    assert (tmp_path / "4").stat().st_mtime_ns == written
    checkpoints.save(make_state(4), metrics={"a": 1})
    assert checkpoints.best_metrics == {"a": 1}
    checkpoints.save(make_state(4, seed=9), metrics={"a": 2})
    assert checkpoints.best_metrics == {"a": 2}
    same(checkpoints.restore(make_state()), make_state(4, seed=9))
    with pytest.raises(ValueError, match="step 3 lies before checkpoint 4"):
      checkpoints.save(make_state(3))
  assert [p.name for p in tmp_path.iterdir()] == ["4"]


def test_killed_while_a_step_is_replaced_the_old_one_is_back(tmp_path):
  saved(tmp_path, 4)
  (tmp_path / "4").rename(tmp_path / "4.replaced")
  reader = Checkpoints(tmp_path, read_only=True)
  assert reader.steps() == [4]
  same(reader.restore(make_state()), make_state(4, seed=4))
  assert [path.name for path in tmp_path.iterdir()] == ["4.replaced"]
  with Checkpoints(tmp_path) as checkpoints:
    same(checkpoints.restore(make_state()), make_state(4, seed=4))


def test_until_it_is_known_to_be_complete_the_replaced_one_counts(tmp_path):
  saved(tmp_path / "old", 3, 4)
  with Checkpoints(tmp_path / "new") as checkpoints:
    checkpoints.save(make_state(4, seed=9))
  (tmp_path / "new" / "4").rename(tmp_path / "old" / "4.new")
  (tmp_path / "old" / "4").rename(tmp_path / "old" / "4.replaced")
  (tmp_path / "old" / "4.new").rename(tmp_path / "old" / "4")
  reader = Checkpoints(tmp_path / "old", read_only=True)
  assert reader.steps() == [3, 4]
  same(reader.restore(make_state()), make_state(4, seed=4))
  with Checkpoints(tmp_path / "old") as checkpoints:
    same(checkpoints.restore(make_state()), make_state(4, seed=4))
    checkpoints.save(make_state(5))
  assert sorted(path.name for path in (tmp_path / "old").iterdir()) == ["4", "5"]


@pytest.mark.parametrize("step", [1, 2])
def test_without_its_seal_on_disk_a_checkpoint_replaces_none(tmp_path, step):
  """As Orbax leaves it when it cannot read its own metadata for a moment."""
  saved(tmp_path, 1)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    write = checkpoints._writer.save_checkpointables_async
    checkpoints._writer.save_checkpointables_async = lambda *args, custom_metadata, **kw: write(
      *args, **kw
    )
    checkpoints.save(make_state(step, seed=9))
    with pytest.raises(
      RuntimeError, match=rf"checkpoint {step} of .* was not written \(still there: \[1\]\)"
    ):
      checkpoints.wait()
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of the one without a seal
      same(checkpoints.restore(make_state()), make_state(1, seed=1))
    checkpoints._writer.save_checkpointables_async = write
    checkpoints.save(make_state(3))
  assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_only_a_writer_clears_what_killed_runs_left(tmp_path):
  saved(tmp_path, 1)
  left = tmp_path / "7.orbax-checkpoint-tmp"
  left.mkdir()
  (left / "data").touch()
  reader = Checkpoints(tmp_path, read_only=True)
  same(reader.restore(make_state()), make_state(1, seed=1))
  assert left.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["1", left.name]
  with pytest.raises(ValueError, match="reading only"):
    reader.save(make_state(2))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(make_state(2))
  assert not left.exists()
  assert reader.steps() == [1, 2]


@pytest.mark.parametrize(
  "leaf, message",
  [
    (np.zeros(2), "average is ndarray, expected jax.Array"),
    (1.0, "average is float, expected jax.Array"),
    (jnp.asarray(1.0), "average is weakly typed"),
    ({"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}}, "two leaves are named average/a/b"),
  ],
)
def test_leaves_that_would_not_come_back_the_same_are_refused(tmp_path, leaf, message):
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=message):
    checkpoints.save(make_state()._replace(average=leaf))


CHILD = """
import sys
sys.path.insert(0, sys.argv[2])
from test_checkpoint import Checkpoints, make_state, same
with Checkpoints(sys.argv[1]) as checkpoints:
  state = checkpoints.restore(make_state())
  step = 0 if state is None else int(state.step)
  if step:
    same(state, make_state(step, seed=step))
  print("restored", step, flush=True)
  while True:
    step += 1
    checkpoints.save(make_state(step, seed=step))
    print("began", step, flush=True)
"""


def test_killed_while_saving_the_step_before_is_there(tmp_path, rng, kills=3):
  """SIGKILL at random moments of a run that does nothing but save."""
  folder, began = tmp_path / "run", 1
  for _ in range(kills):
    command = [sys.executable, "-c", CHILD, str(folder), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
      lines = [child.stdout.readline()]
      # `began n` is printed after checkpoint n - 1 is complete.
      assert lines[0].startswith("restored") and int(lines[0].split()[1]) >= began - 1, (
        lines,
        began,
      )
      for _ in range(int(rng.integers(1, 6))):
        lines.append(child.stdout.readline())
      time.sleep(float(rng.uniform(0, 0.1)))
      child.send_signal(signal.SIGKILL)
      lines += child.stdout.read().splitlines()
    began = max(int(line.split()[1]) for line in lines if line.startswith("began"))
  with Checkpoints(folder) as checkpoints:
    state = checkpoints.restore(make_state())
  assert int(state.step) >= began - 1
  same(state, make_state(int(state.step), seed=int(state.step)))


@pytest.mark.slow
def test_killed_50_times_while_saving(tmp_path, rng):
  test_killed_while_saving_the_step_before_is_there(tmp_path, rng, kills=50)
