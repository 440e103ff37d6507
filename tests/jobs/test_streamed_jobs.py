"""Jobs on images that are read while training: configs/folder.py on generated pictures."""

import json
import re
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
from pictures import write_classes

from distill_jax import train
from distill_jax.data.sets import folder
from distill_jax.jobs import config, plan
from distill_jax.jobs import data as job_data
from distill_jax.jobs.cli import main, run
from distill_jax.jobs.overrides import load_config
from distill_jax.models import from_apply
from distill_jax.storage.student import load_student

SIZE = 8
COUNTS = {"train": {"cat": 20, "dog": 20}, "test": {"cat": 5, "dog": 4}}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Two folders of pictures of 20 x 24; one for training and one for testing cannot be decoded."""
  root = tmp_path_factory.mktemp("photos")
  for name, counts in COUNTS.items():
    write_classes(root / name, counts, size=(20, 24))
  for broken in ("train/dog/7.png", "test/cat/0.png"):
    (root / broken).write_bytes((root / broken).read_bytes()[:200])
  return root


def command(photos, *more):
  small = [
    f"size={SIZE}",
    "max_bad=0.2",
    "student_widths=(2,)",
    "teacher_width=0.03125",
    "eval_every=2",
  ]
  small += [
    f"{role}_training.{name}"
    for role in ("teacher", "student")
    for name in ("steps=2", "batch_size=4")
  ]
  paths = [f"{name}_dir={photos / name}" for name in COUNTS]
  return [
    "--config=configs/folder.py",
    *(f"--config.{o}" for o in [*paths, *small, "devices=1", *more]),
  ]


@pytest.mark.integration
def test_all_stages_on_a_folder_of_images(photos, tmp_path, capsys):
  main([*command(photos), f"--workdir={tmp_path}"])
  results = json.loads((tmp_path / "report" / "results.json").read_text())
  sizes = {"train": 40 - held_out(photos), "validation": held_out(photos), "test": 9}
  assert results["run"]["data"].items() >= {"name": "test", **sizes}.items()
  assert [entry["name"] for entry in results["classes"]] == ["cat", "dog"]
  assert [entry["examples"] for entry in results["classes"]] == [4, 4]  # the broken cat is left out
  settings = loaded(photos)
  images = folder.images(photos / "test", max_bad=0.2)
  weights = load_student(
    tmp_path / "student-0", settings.student(), job_data.first(settings, images)
  )
  apply = settings.student().apply
  right = 0
  for path, pixels in centers(photos).items():
    logits = apply(*weights, {"image": pixels[None]}, train=False, key=None)[0]["logits"]
    right += int(logits.argmax()) == (path.parent.name == "dog")
  (student,) = [e["scores"] for e in results["entries"] if e["role"] == "student"]
  assert student["accuracy"] == pytest.approx(right / 8)
  main([*command(photos), f"--workdir={tmp_path}", "--stages=teacher,baseline,student"])
  assert capsys.readouterr().out.count("complete, skipped") == 3


def centers(photos):
  """The central 7/8 of the shorter side of each test picture that can be decoded, here 17.5 of
  20 x 24 pixels.
  """
  found, box = {}, (12 - 8.75, 10 - 8.75, 12 + 8.75, 10 + 8.75)
  for path in sorted((photos / "test").rglob("*.png"))[1:]:
    with PIL.Image.open(path) as image:
      square = image.resize((SIZE, SIZE), PIL.Image.Resampling.BILINEAR, box=box)
    found[path] = np.asarray(square, np.float32) / 255
  return found


def held_out(photos):
  return len(loaded(photos).data().validation)


def loaded(photos):
  return load_config(
    "configs/folder.py", [o.removeprefix("--config.") for o in command(photos)[1:]]
  )


def test_the_dry_run_describes_a_folder_of_images(photos, tmp_path, capsys):
  main([*command(photos), f"--workdir={tmp_path / 'run'}", "--dry_run"])
  out = capsys.readouterr().out
  size = 40 - held_out(photos)
  assert f"trained on {size} examples of train, {size} with a label" in out
  assert "block1: ('batch', 8, 8, 2) float32" in out and "one step of batch 4" in out
  assert not (tmp_path / "run").exists()


def test_predictions_batch_by_batch_are_those_in_memory(photos):
  settings = loaded(photos)
  images = folder.images(photos / "test", max_bad=0.2)
  model = from_apply(None, lambda w, x: x.reshape(len(x), -1)[:, :2] * w, variables=np.float32(2))
  streamed = job_data.evaluation(settings, images, 4)
  entries = job_data.references(streamed, ("id", "label", "image"))
  assert entries["id"].tolist() == list(range(1, 9))
  assert entries["label"].tolist() == [0] * 4 + [1] * 4
  pixels = np.stack(list(centers(photos).values()))
  assert entries["image"].dtype == np.uint8
  np.testing.assert_allclose(entries["image"] / 255, pixels, atol=0.501 / 255)
  logits = train.predict(model, None, streamed)["logits"]
  np.testing.assert_allclose(logits, 2 * pixels.reshape(8, -1)[:, :2], atol=1e-6)


def test_report_leaves_out_too_many_images(photos, monkeypatch):
  monkeypatch.setattr(job_data, "MAX_IMAGE_BYTES", 4 * SIZE * SIZE * 3)
  images = folder.images(photos / "test", max_bad=0.2)
  streamed = job_data.evaluation(loaded(photos), images, 4)
  entries = job_data.references(streamed, ("label", "image"))
  assert "image" not in entries and len(entries["label"]) == 8


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("train_dir=", "train_dir"),
    ("train_dir=PHOTOS/trian", "trian"),
    ("test_dir=PHOTOS/other", "class_names"),
    ("student_training.batch_size=64", "student_training.batch_size"),
    ("size=2", "size"),
  ],
)
def test_wrong_settings_are_rejected_before_training(photos, tmp_path, capsys, change, message):
  if not (photos / "other").exists():
    shutil.copytree(photos / "test" / "cat", photos / "other" / "cat")
    shutil.copytree(photos / "test" / "dog", photos / "other" / "fish")
  with pytest.raises(SystemExit):
    run([*command(photos, change.replace("PHOTOS", str(photos))), f"--workdir={tmp_path / 'run'}"])
  error = capsys.readouterr().err
  assert re.search(message, error), error
  assert not (tmp_path / "run").exists()


def test_images_need_crops(photos, tmp_path):
  settings = loaded(photos)
  settings.crops = lambda: config.Config.crops(settings)
  job = plan.Job(settings, tmp_path, (0,), settings.data(), {})
  with pytest.raises(config.ConfigError, match="crops"):
    job_data.first(job.config, job.splits.train)


def test_batches_in_memory_and_streamed_have_one_shape(photos):
  settings = loaded(photos)
  batch = next(job_data.training_batches(settings, settings.data().train, 4))
  shapes = jax.tree.map(np.shape, batch)
  assert shapes == {"id": (4,), "view": (4,), "label": (4,), "image": (4, SIZE, SIZE, 3)}
