"""Writes golden_boxes.json: overlaps and suppressed boxes of torchvision, in float64.

PYTHONPATH=tests python tests/boxes/make_golden_boxes.py [--check]

--check writes nothing and exits with 1 where a value differs. It needs another environment:

  python -m venv /tmp/boxes
  /tmp/boxes/bin/pip install torch==2.14.1 torchvision==0.29.1 numpy
  PYTHONPATH=tests /tmp/boxes/bin/python tests/boxes/make_golden_boxes.py --check
"""

import importlib.metadata
import json
import pathlib
import sys

import numpy as np
import torch
import torchvision.ops
from box_references import random_boxes

GOLDEN = pathlib.Path(__file__).with_name("golden_boxes.json")
OVERLAPS = {
  "iou": torchvision.ops.box_iou,
  "giou": torchvision.ops.generalized_box_iou,
  "diou": torchvision.ops.distance_box_iou,
  "ciou": torchvision.ops.complete_box_iou,
}
THRESHOLDS = (0.1, 0.3, 0.6)


def main() -> None:
  values = page()
  if "--check" not in sys.argv:
    GOLDEN.write_text(json.dumps(values) + "\n")
    return
  same = _flat(json.loads(GOLDEN.read_text())) == _flat(values)
  print(f"{GOLDEN.name} {'is' if same else 'is not'} what the package gives")
  raise SystemExit(not same)


def page() -> dict:
  rng = np.random.default_rng(0)
  a = random_boxes(rng, 6).round(3)
  b = np.concatenate([a[:2], random_boxes(rng, 4).round(3)])
  boxes = random_boxes(rng, 40).round(3)
  scores = rng.uniform(0.1, 1, 40).round(4)
  classes = rng.integers(0, 3, 40)
  overlaps = {name: f(torch.tensor(a), torch.tensor(b)) for name, f in OVERLAPS.items()}
  tensors = [torch.tensor(x) for x in (boxes, scores, classes)]
  kept = {str(t): torchvision.ops.batched_nms(*tensors, t).tolist() for t in THRESHOLDS}
  return {
    "made_by": {name: importlib.metadata.version(name) for name in ("torch", "torchvision")},
    "a": a.tolist(),
    "b": b.tolist(),
    "overlaps": {name: x.numpy().round(9).tolist() for name, x in overlaps.items()},
    "boxes": boxes.tolist(),
    "scores": scores.tolist(),
    "classes": classes.tolist(),
    "rows": kept,
  }


def _flat(values: dict) -> str:
  return json.dumps(values, sort_keys=True)


if __name__ == "__main__":
  main()
