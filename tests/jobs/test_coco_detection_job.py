"""configs/coco_detection.py on generated images and annotations."""

import json

import numpy as np
import PIL.Image
import pytest
from coco_detection import CocoDetection

from distill_jax.jobs.cli import main
from distill_jax.jobs.config import ConfigError

SMALL = [
  *("--config.teacher_widths=(2,4)", "--config.student_widths=(2,2)", "--config.crop=16"),
  *("--config.teacher_training.steps=2", "--config.student_training.steps=2"),
  *("--config.teacher_training.warmup_steps=0", "--config.student_training.warmup_steps=0"),
  *("--config.class_names=bright,dark", "--config.pad_to=(16,20)", "--config.devices=1"),
]


def write(folder, name):
  """Writes 40 images with a square each, but for some, and their annotations."""
  rng = np.random.default_rng(0)
  (folder / name).mkdir(parents=True)
  images, annotations = [], []
  for i in range(1, 41):
    pixels = np.full((16, 17 + i % 4, 3), 128, np.uint8)
    if i % 8:
      x, y, side = rng.integers(0, 8, 3) + [0, 0, 4]
      pixels[y : y + side, x : x + side] = 255 * (i % 2)
      side = min(int(side), 16 - int(y))
      box = [int(x), int(y), side, side]
      annotations.append(
        {"id": i, "image_id": i, "category_id": 3 if i % 2 else 7, "bbox": box, "iscrowd": 0}
      )
    file = f"{i}.png"
    PIL.Image.fromarray(pixels).save(folder / name / file)
    size = {"height": pixels.shape[0], "width": pixels.shape[1]}
    images.append({"id": i, "file_name": file, **size})
  categories = [{"id": 7, "name": "dark"}, {"id": 3, "name": "bright"}]
  content = {"images": images, "annotations": annotations, "categories": categories}
  (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_job_trains_on_crops_and_scores_full_images(tmp_path):
  flags = []
  for part in ("train", "test"):
    write(tmp_path, part)
    flags.append(f"--config.{part}_annotations={tmp_path / part}.json")
    flags.append(f"--config.{part}_images={tmp_path / part}")
  workdir = tmp_path / "run"
  main(["--config=configs/coco_detection.py", *SMALL, *flags, f"--workdir={workdir}"])
  results = json.loads((workdir / "report" / "results.json").read_text())
  scores = {entry["role"]: entry["scores"] for entry in results["entries"]}
  assert list(scores) == ["teacher", "baseline", "student"]
  assert all(0 <= networks["ap"] <= 1 for networks in scores.values())


@pytest.mark.parametrize(
  "changed, field",
  [
    ({"train_annotations": ""}, "train_annotations"),
    ({"test_images": ""}, "test_images"),
    ({"class_names": ()}, "class_names"),
    ({"pad_to": (64,)}, "pad_to"),
    ({"pad_to": (64, 100)}, "pad_to"),
    ({"crop": 100}, "crop"),
    ({"student_widths": (8, 16, 32, 64)}, "student_widths"),
  ],
)
def test_fields_are_checked(changed, field):
  paths = ("train_annotations", "train_images", "test_annotations", "test_images")
  fields = dict.fromkeys(paths, "a") | {"class_names": ("car",), "pad_to": (64, 96)} | changed
  with pytest.raises(ConfigError, match=rf"^{field}: expected"):
    CocoDetection(**fields).validate()
