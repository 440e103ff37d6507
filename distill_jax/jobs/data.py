"""Reads a job's data for its stages: examples in memory (`Source`) or encoded (`Images`) alike."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from distill_jax import data
from distill_jax.data import Source
from distill_jax.data.batches import HostBatch
from distill_jax.data.text import LengthBuckets
from distill_jax.jobs.config import Config, Examples
from distill_jax.train.options import Batches
from distill_jax.train.prediction import iterate
from distill_jax.types import Batch

MAX_IMAGE_BYTES = 2**29
"""Bytes of decoded images that are held for a report's pictures."""


def training(
  config: Config, examples: Examples, batch_size: int, seed: int
) -> Source | Callable[[int], Any]:
  """Returns what `fit` takes as its source: the examples, or a function from the step to shuffled
  batches.
  """
  if isinstance(examples, Source):
    lengths = config.lengths()
    return LengthBuckets(examples, batch_size, seed, lengths) if lengths else examples
  from distill_jax.data.stream import Stream  # Grain: two seconds that sets in memory need not wait

  return Stream(examples, batch_size, config.crops().training, seed, config.num_views)


def evaluation(config: Config, examples: Examples, batch_size: int = 256) -> Batches:
  """Returns every example once, in order."""
  if isinstance(examples, Source):
    return examples
  from distill_jax.data.stream import EvalStream

  return EvalStream(examples, batch_size, config.crops().evaluation)


def training_batches(config: Config, examples: Examples, batch_size: int) -> Iterator[HostBatch]:
  """Returns the batches of a run of seed 0."""
  source = training(config, examples, batch_size, 0)
  if isinstance(source, Source):
    return data.batches(source, batch_size, seed=0, balance=config.balance or None)
  return iter(source(0))


def digest(examples: Examples) -> str:
  """Returns a text that is equal for the same examples only; of images, by the set's `content`."""
  return f"{examples.name}:{examples.digest}"


def first(config: Config, examples: Examples, rows: int = 2) -> Batch:
  """Returns the first `rows` examples, or all if they are fewer; some losses relate two."""
  if isinstance(examples, Source):
    return {name: values[:rows] for name, values in examples.arrays.items()}
  size = min(rows, len(examples))
  return next(iterate(evaluation(config, examples, size), size))


def references(examples: Batches, names: tuple[str, ...]) -> dict[str, np.ndarray]:
  """Returns entries of all examples, in order, for a report; images are bytes.

  Entries that the examples do not have are left out, and so are images of more than
  `MAX_IMAGE_BYTES`.
  """
  if isinstance(examples, Source):
    return {name: examples.arrays[name] for name in names if name in examples.arrays}
  parts: dict[str, list[np.ndarray]] = {}
  image_bytes = 0
  for batch in iterate(examples, 256):
    where = batch["where"]
    image_bytes += batch["image"].size if "image" in batch else 0
    for name in names:
      if name == "image" and image_bytes > MAX_IMAGE_BYTES:
        parts.pop(name, None)
      elif name in batch:
        values = batch[name][where]
        values = (255 * values).round().astype(np.uint8) if name == "image" else values
        parts.setdefault(name, []).append(values)
  return {name: np.concatenate(values) for name, values in parts.items()}
