"""A job that keeps its teacher's outputs: written once, read by every student, looked at,
refused.
"""

import io
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
import safetensors.numpy
import small_digits

from distill_jax import data
from distill_jax.cache import TopK
from distill_jax.cache.codecs import estimates
from distill_jax.data.images import Images
from distill_jax.data.sets import digits, tfds
from distill_jax.jobs import cache_stages
from distill_jax.jobs import data as job_data
from distill_jax.jobs.cli import main
from distill_jax.jobs.config import Splits, TrainedTeacher
from distill_jax.jobs.overrides import load_config
from distill_jax.jobs.plan import Job
from distill_jax.models import from_apply, from_nnx
from distill_jax.models.zoo.mlp import MLP
from distill_jax.train import RunOptions, StepOptions, fit

CONFIG = """
import dataclasses

from quick_digits import Digits

from distill_jax import data, losses, objectives
from distill_jax.cache import Dense, TopK


@dataclasses.dataclass
class Cached(Digits):
  shift: int = 0
  k: int = 0

  def augment(self):
    return data.augmentation(data.shift_crop(self.shift), seed=0) if self.shift else None

  def cached_outputs(self):
    return {"logits": TopK(self.k, self.temperature) if self.k else Dense("float32")}

  def objective(self):
    if not self.k:
      return super().objective()
    return objectives.weighted(soft=(1.0, objectives.sparse(losses.sparse_kl)))


def get_config():
  return Cached()
"""
SMALL = [
  "--config.teacher_width=0.03125",
  "--config.teacher_training.steps=4",
  "--config.student_training.steps=6",
  "--config.eval_every=3",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """With a config, and a run whose teacher is trained."""
  folder = tmp_path_factory.mktemp("job")
  (folder / "cached.py").write_text(CONFIG)
  small_digits.write(folder)
  main(
    [
      f"--config={folder / 'cached.py'}",
      *SMALL,
      f"--workdir={folder / 'start'}",
      "--stages=teacher",
    ]
  )
  return folder


@pytest.fixture
def run(folder, tmp_path, capsys):
  """Runs the job in a folder of its own, with the trained teacher; gives what was printed."""

  def run(*arguments, name="run", stages=None):
    if not (tmp_path / name).exists() and name != "wider":
      shutil.copytree(folder / "start" / "teacher", tmp_path / name / "teacher")
    command = [
      f"--config={folder / 'cached.py'}",
      *SMALL,
      f"--workdir={tmp_path / name}",
      *arguments,
    ]
    main(command + ([f"--stages={stages}"] if stages else []))
    return capsys.readouterr().out

  return run


def weights(folder):
  return safetensors.numpy.load_file(folder / "model.safetensors")


def test_student_from_cache_matches_live_teacher(run, tmp_path):
  shifted, cache = (
    ["--config.shift=1", "--config.num_views=2"],
    f"--config.cache={tmp_path / 'cache'}",
  )
  rows, students = 2 * len(digits_train()), dict(stages="teacher,cache,student")
  out = run(cache, *shifted, "--seeds=0,1", **students)
  assert f"cache: {rows:,} rows in {tmp_path / 'cache'}: written in" in out
  assert "student-1: accuracy" in out
  again = run(cache, *shifted, "--seeds=0,1", **students)
  assert f"{rows:,} rows in {tmp_path / 'cache'}: reused, written 20" in again
  assert again.count("complete, skipped") == 3
  run(*shifted, name="live", stages="student")
  kept, live = (weights(tmp_path / name / "student-0") for name in ("run", "live"))
  for name in live:
    np.testing.assert_allclose(kept[name], live[name], atol=1e-6, err_msg=name)


def test_another_run_may_read_the_same_cache(run, tmp_path):
  cache = f"--config.cache={tmp_path / 'cache'}"
  run(cache, stages="cache")
  out = run(
    cache,
    "--config.label_fraction=0.2",
    "--config.temperature=2",
    name="other",
    stages="cache,student",
  )
  assert "reused, written 20" in out and "student-0: accuracy" in out
  with pytest.raises(ValueError, match=r"augmentation\.name"):
    run(cache, "--config.shift=1", "--config.num_views=1", name="shifted", stages="cache")


def test_a_cache_that_lacks_a_shard_is_not_called_reused(run, tmp_path):
  cache = "--config.cache={workdir}/cache"
  run(cache, stages="cache")
  shard = tmp_path / "run" / "cache" / "shard-00000000"
  before = shard.read_bytes()
  shard.unlink()
  assert f"rows in {tmp_path / 'run' / 'cache'}: written in" in run(cache, stages="cache")
  assert shard.read_bytes() == before
  assert "reused, written 20" in run(cache, stages="cache")


def test_student_stage_rejects_the_cache_of_another_teacher(run, tmp_path):
  cache = f"--config.cache={tmp_path / 'cache'}"
  run(cache, stages="cache")
  with pytest.raises(ValueError, match=r"outputs\.logits\.codec\.name"):
    run(cache, "--config.k=3", name="other", stages="student")
  with pytest.raises(ValueError, match=r"teacher\.teacher_width"):
    run(cache, "--config.teacher_width=0.0625", name="wider", stages="teacher,student")


@pytest.mark.integration
def test_top_k_cache_is_estimated_inspected_and_verified(run, tmp_path):
  settings = [f"--config.cache={tmp_path / 'cache'}", "--config.k=3"]
  out = run(*settings, stages="cache_estimate")
  assert not (tmp_path / "cache").exists()
  assert (
    "40 bytes a row, 16 of them as configured (logits), the others ids, checksums and padding"
    in out
  )
  size = int(re.search(r"([0-9,]+) bytes in 1 shards", out)[1].replace(",", ""))
  assert "| TopK(4) |" in out and "| RandomSampling(12) |" in out
  out = run(*settings, stages="cache,student,cache_inspect,cache_verify")
  assert size == sum(path.stat().st_size for path in (tmp_path / "cache").glob("shard-*"))
  assert "student-0: accuracy" in out
  assert "outputs.logits.codec.k: 3" in out and "teacher.teacher_width: 0.03125" in out
  assert "accuracy on" in out
  assert "cache_verify: logits: 256 rows" in out and "100.0%" in out
  assert "every checksum holds" in out


def test_settings_that_do_not_fit_a_cache_are_rejected_first(run, tmp_path):
  cache = f"--config.cache={tmp_path / 'cache'}"
  with pytest.raises(ValueError, match="num_views"):
    run(cache, "--config.shift=1")
  with pytest.raises(ValueError, match="num_views"):
    run(cache, "--config.num_views=3")
  with pytest.raises(ValueError, match="cache_batch_size"):
    run(cache, "--config.cache_batch_size=20")
  with pytest.raises(ValueError, match="k"):
    run(cache, "--config.k=11")
  with pytest.raises(ValueError, match="--stages: cache_verify"):
    run(stages="cache_verify")
  with pytest.raises(ValueError, match="cache"):
    run(cache, name="apart", stages="student")
  with pytest.raises(ValueError, match="cache"):
    run("--config.cache=ftp://host/folder")
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match="file"):
    run(f"--config.cache={tmp_path / 'file'}", name="nowhere")
  assert not (tmp_path / "nowhere" / "baseline-0").exists()


def test_a_dry_run_knows_the_shapes_of_what_is_kept(run, tmp_path):
  out = run(f"--config.cache={tmp_path / 'cache'}", "--config.k=3", "--dry_run")
  assert "student: 2,410 parameters" in out and not (tmp_path / "cache").exists()


def pictures(rows=24, content="a"):
  """Encoded images of 20 x 24 pixels, the fourth of them broken."""
  files = []
  for row in range(rows):
    file = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(row).integers(0, 256, (20, 24, 3), np.uint8)).save(
      file, "PNG"
    )
    files.append(file.getvalue()[: 100 if row == 3 else None])
  read = lambda ids: [(files[id], id % 2) for id in ids]  # noqa: E731
  return Images(read, np.arange(rows), 2, name="pictures", content=content, max_bad=0.2)


@pytest.mark.integration
def test_streamed_images_have_a_cache(tmp_path, capsys, monkeypatch):
  """By the stages' functions: crops of configs/folder.py, and its mirroring besides."""
  (tmp_path / "cat").mkdir()
  folders = [f"{name}_dir={tmp_path}" for name in ("train", "test")]
  small = [
    "size=8",
    "student_widths=(2,)",
    "devices=1",
    f"cache={tmp_path / 'cache'}",
    "cache_batch_size=8",
  ]

  def job(num_views=2, images=None, **changed):
    images = images or pictures()
    settings = [f"{name}={value}" for name, value in {"num_views": num_views, **changed}.items()]
    config = load_config("configs/folder.py", [*folders, *small, *settings])
    return Job(config, tmp_path, (0,), Splits(images, images, images), {})

  kernel = jnp.asarray(np.random.default_rng(1).normal(size=(8 * 8 * 3, 2)), jnp.float32)
  teacher = from_apply(None, lambda w, x: (x.reshape(len(x), -1) @ w, {}), variables=kernel)
  trained_teacher = TrainedTeacher(teacher, teacher.variables, None)
  monkeypatch.setattr(estimates, "default_codecs", lambda classes, **_: [TopK(1)])
  cache_stages.estimate_cost(job(), trained_teacher)
  assert "48 rows, " in capsys.readouterr().out and not (tmp_path / "cache").exists()
  cache_stages.write(job(), trained_teacher)
  cache_stages.write(job(), trained_teacher)
  out = capsys.readouterr().out
  assert out.count("cache: 48 rows in") == 2 and out.endswith("\n") and "reused, written 20" in out
  cache_stages.inspect(job())
  cache_stages.check(job(), trained_teacher)
  out = capsys.readouterr().out
  assert "data.crop.name: random_resized_crop(" in out and "cache_verify: logits: 46 rows" in out
  cached, found = cache_stages.open_checked(job(), trained_teacher), {}
  for name, from_teacher in (("cached", cached), ("live", teacher)):
    config, images = job().config, pictures()
    source = job_data.training(config, images, 8, 0)
    student = from_nnx(lambda rngs: MLP(8 * 8 * 3, (4,), 2, rngs=rngs))
    settings = dict(
      steps=7,
      batch_size=8,
      step=StepOptions(augment=config.augment()),
      run=RunOptions(num_views=2, progress=False),
    )
    fitted = fit(student, from_teacher, config.objective(), optax.sgd(0.1), source, **settings)
    found[name] = jax.tree.leaves(fitted.state.params)
  for kept, live in zip(found["cached"], found["live"]):
    np.testing.assert_allclose(kept, live, atol=1e-3)  # float16
  with pytest.raises(ValueError, match="data.crop.name"):
    cache_stages.open_checked(job(least_area=0.5), trained_teacher)
  with pytest.raises(ValueError, match=r"data\.content"):
    cache_stages.open_checked(job(images=pictures(content="b")), trained_teacher)
  with pytest.raises(ValueError, match="num_views"):
    cache_stages.open_checked(job(num_views=3), trained_teacher)
  endless = job()
  endless.config.num_views = 0
  with pytest.raises(ValueError, match="num_views"):
    cache_stages.write(endless, trained_teacher)


FASHION = [
  "--config=configs/fashion_mnist_cached.py",
  "--config.teacher_width=0.03125",
  "--config.student_widths=(2,)",
  "--config.devices=1",
  "--config.num_views=2",
  "--config.cache_batch_size=32",
  *(
    f"--config.{role}_training.{field}"
    for role in ("teacher", "student")
    for field in ("steps=2", "batch_size=8")
  ),
]


@pytest.fixture
def fashion(monkeypatch, tmp_path, rng, capsys):
  """Runs configs/fashion_mnist_cached.py on random images; gives what was printed."""
  arrays = {"image": rng.random((40, 28, 28, 1), np.float32), "label": rng.integers(0, 10, 40)}
  source = data.Source(arrays, 10, name="fashion_mnist")
  monkeypatch.setattr(tfds, "load", lambda *args, **settings: {"train": source, "test": source})

  def run(*arguments):
    main(
      [
        *FASHION,
        f"--workdir={tmp_path / 'run'}",
        f"--config.cache={tmp_path / 'cache'}",
        *arguments,
      ]
    )
    return capsys.readouterr().out

  return run


@pytest.mark.slow
def test_fashion_mnist_config_writes_and_reuses_its_cache(fashion, tmp_path):
  first = fashion("--stages=teacher,cache,student")
  rows = 2 * len(
    data.split(data.Source({"label": np.zeros(40, int)}, 10, name="fashion_mnist"), 0.1)[0]
  )
  assert (
    f"cache: {rows} rows in {tmp_path / 'cache'}: written in" in first
    and "student-0: accuracy" in first
  )
  again = fashion("--stages=teacher,cache,student")
  assert f"{rows} rows in {tmp_path / 'cache'}: reused, written 20" in again
  assert again.count("complete, skipped") == 2
  out = fashion("--stages=cache_inspect,cache_verify")
  assert "outputs.logits.codec.name: Dense" in out and "every checksum holds" in out


@pytest.mark.parametrize("codec", ["top_k", "random_sampling"])
def test_fashion_mnist_config_fits_every_codec(fashion, tmp_path, codec, monkeypatch):
  checked = []  # before a step is compiled
  monkeypatch.setattr(
    "distill_jax.jobs.cli.print_plan", lambda job: checked.append(job.config.codec)
  )
  fashion(f"--config.codec={codec}", "--dry_run")
  assert checked == [codec] and not (tmp_path / "cache").exists()
  with pytest.raises(ValueError, match="codec"):
    fashion("--config.codec=top_kk", "--dry_run")


def digits_train():
  train, _ = data.split(digits.load()["train"], 0.1)
  return train
