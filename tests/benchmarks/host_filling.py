"""Times how a cache is filled from a host teacher, against the teacher's own calls."""

import tempfile
import time
from typing import NamedTuple
from unittest import mock

import numpy as np
from timing import Ratio, compare

from distill_jax import teachers
from distill_jax.cache import Dense, write_cache, writer
from distill_jax.data import Source


class Sizes(NamedTuple):
  """Sizes of a benchmark.

  Attributes:
    batches: number of batches of 64 rows; 8 make a shard.
    seconds: of a call of the teacher.
    classes: number of logits of a row.
  """

  batches: int
  seconds: float
  classes: int


def imagenet(quick: bool = False) -> Sizes:
  """Returns the sizes of 8,192 images with 1,000 classes, of which 800 take a second."""
  return Sizes(3, 0.005, 10) if quick else Sizes(128, 0.08, 1000)


def fill_to_calls(sizes: Sizes, pairs: int) -> Ratio:
  """Times `fill_missing` / the same calls of the teacher, which waits as for another device."""
  images = np.random.default_rng(0).normal(size=(64 * sizes.batches, 32)).astype(np.float32)
  logits = np.random.default_rng(1).normal(size=(64, sizes.classes)).astype(np.float32)

  def predict(batch):
    time.sleep(sizes.seconds)
    return {"logits": logits[np.arange(len(batch["image"])) % 64]}

  teacher = teachers.host(predict, identity="a constant")
  fill_missing = writer.fill_missing
  spent = []

  def timed(*arguments, **options):
    start = time.perf_counter()
    fill_missing(*arguments, **options)
    spent.append(time.perf_counter() - start)

  def ours(calls):
    patched = mock.patch.multiple(writer, fill_missing=timed, SHARD_BATCHES=8)
    with tempfile.TemporaryDirectory() as folder, patched:
      codecs = {"logits": Dense("float32")}
      write_cache(folder, teacher, Source({"image": images}), codecs, batch_size=64, progress=False)

  def theirs(calls):
    start = time.perf_counter()
    for first in range(0, len(images), 64):
      predict({"image": images[first : first + 64]})
    spent.append(time.perf_counter() - start)

  # Only what was timed: neither the checks before the filling nor reading back after it.
  return compare(ours, theirs, pairs=pairs, calls=1, clock=lambda: sum(spent))
