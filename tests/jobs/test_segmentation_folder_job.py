"""configs/segmentation_folder.py on generated images and masks."""

import json

import numpy as np
import PIL.Image
import pytest
from segmentation_folder import SegmentationFolder

from distill_jax.jobs.cli import main
from distill_jax.jobs.config import ConfigError

SMALL = [
  *("--config.teacher_widths=(2,2)", "--config.student_widths=(2,2,2)", "--config.crop=8"),
  *("--config.teacher_training.steps=2", "--config.student_training.steps=2"),
  *("--config.class_names=dark,bright", "--config.pad_to=(10,12)", "--config.devices=1"),
]


def write(folder):
  rng = np.random.default_rng(0)
  for name in ("images", "masks"):
    (folder / name).mkdir(parents=True)
  for i in range(40):
    label = rng.integers(0, 2, (10, 9 + i % 4)).astype(np.uint8)
    PIL.Image.fromarray(120 * label).convert("RGB").save(folder / f"images/{i}.png")
    PIL.Image.fromarray(label).save(folder / f"masks/{i}.png")
  return folder


@pytest.mark.slow
def test_job_trains_on_crops_and_scores_full_images(tmp_path):
  train, test = write(tmp_path / "train"), write(tmp_path / "test")
  folders = [f"--config.train_dir={train}", f"--config.test_dir={test}"]
  workdir = tmp_path / "run"
  main(["--config=configs/segmentation_folder.py", *SMALL, *folders, f"--workdir={workdir}"])
  results = json.loads((workdir / "report" / "results.json").read_text())
  scores = {entry["role"]: entry["scores"] for entry in results["entries"]}
  assert list(scores) == ["teacher", "baseline", "student"]
  assert all(0 <= networks["miou"] <= 1 for networks in scores.values())


@pytest.mark.parametrize(
  "changed, field",
  [
    ({"train_dir": ""}, "train_dir"),
    ({"class_names": ("road",)}, "class_names"),
    ({"pad_to": (64,)}, "pad_to"),
    ({"crop": 100}, "crop"),
  ],
)
def test_fields_are_checked(changed, field):
  fields = {"train_dir": "a", "test_dir": "b", "class_names": ("road", "car")} | changed
  with pytest.raises(ConfigError, match=rf"^{field}: expected"):
    SegmentationFolder(**fields).validate()
