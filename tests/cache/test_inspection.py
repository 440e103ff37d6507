"""Checks the texts that describe a cache."""

import dataclasses

import numpy as np
from scipy.special import log_softmax, softmax
from toys import ROWS, teacher_logits, written

from distill_jax import data
from distill_jax.cache import RandomSampling, TopK, describe


def test_describe_has_confidence_and_accuracy(cached, source):
  logits = teacher_logits(source.arrays["image"])
  largest = softmax(logits, -1).max(-1)
  accuracy = (logits.argmax(-1) == source.arrays["label"]).mean()
  text = describe(cached, source)
  assert f"largest probability, mean {largest.mean():.3f}" in text
  assert f"accuracy on {ROWS} labeled examples of toy: {accuracy:.4f}" in text
  assert f"0.9 to 1.0  {(largest >= 0.9).mean():6.1%}" in text
  assert "60 rows: 60 examples x 1 views" in text and "teacher.weights" in text


def test_describe_has_the_cross_entropy_of_stored_labels(tmp_path, source):
  log_probs = log_softmax(teacher_logits(source.arrays["image"], temperature=2.0), -1)
  label = np.where(np.arange(ROWS) < 40, source.arrays["label"], data.UNLABELED)
  partly = dataclasses.replace(
    source, arrays={**source.arrays, "label": label}, ignore_label=data.UNLABELED
  )
  outputs = {"logits@samples": RandomSampling(2), "logits": TopK(2, temperature=2.0)}
  text = describe(written(tmp_path, partly, outputs=outputs))
  expected = -log_probs[np.arange(40), label[:40]].mean()
  assert f"cross entropy at temperature 2 on 40 stored labels: {expected:.4f}" in text


def test_describe_without_confidence_or_classes(tmp_path, cached, source):
  samples = written(tmp_path, source, outputs={"logits": RandomSampling(2)})
  assert "confidence is unknown" in describe(samples, source)
  targets = np.linspace(0, 1, ROWS, dtype=np.float32)
  regression = data.Source({**source.arrays, "label": targets}, name="toy")
  assert "accuracy" not in describe(cached, regression)


def test_repr_has_size_and_identity(augmented):
  text = repr(augmented)
  folder = augmented.store.folder
  size = sum(path.stat().st_size for path in folder.glob("shard-*"))
  row_bytes = 16 + 5 * 4 + 4
  assert text.startswith(
    f"cache in {folder}\n  120 rows: 60 examples x 2 views, {row_bytes} bytes a row, {size:,} "
  )
  assert "\n  data.name: toy\n" in text and "... 32 in all]" in text
  assert "outputs.logits.codec.dtype: float32" in text
  assert describe(augmented).startswith(text)
