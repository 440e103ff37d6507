"""What a job's stages read of its data, in memory (`Source`) or encoded (`Images`) alike."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax import data, metrics, reduce
from distill_jax.data import Source
from distill_jax.data.batches import HostBatch
from distill_jax.jobs.config import Config, Examples
from distill_jax.types import Batch, Model, Variables

Trained = tuple[Model, Variables]
Batches = Source | Iterable[HostBatch]
"""As `fit` takes them for validation."""
SHOWN = 2**29  # bytes of decoded images that are kept for a report's pictures


class Known(NamedTuple):
  """What a report shows of the test split beside the predictions; `images` may be None."""

  labels: np.ndarray
  ids: np.ndarray
  images: np.ndarray | None


def training(
  config: Config, examples: Examples, batch_size: int, seed: int
) -> Source | Callable[[int], Any]:
  """What `fit` takes as its source: the examples, or a function from the step to their shuffled batches."""
  if isinstance(examples, Source):
    return examples
  from distill_jax.data.stream import Stream  # Grain: two seconds that sets in memory need not wait

  return Stream(examples, batch_size, config.crops().training, seed, config.num_views)


def evaluation(config: Config, examples: Examples, batch_size: int = 256) -> Batches:
  """Every example once, in order."""
  if isinstance(examples, Source):
    return examples
  from distill_jax.data.stream import EvalStream

  return EvalStream(examples, batch_size, config.crops().evaluation)


def training_batches(config: Config, examples: Examples, batch_size: int) -> Iterator[HostBatch]:
  """The batches of a run of seed 0."""
  source = training(config, examples, batch_size, 0)
  return data.batches(source, batch_size, seed=0) if isinstance(source, Source) else iter(source(0))


def first(config: Config, examples: Examples, rows: int = 1) -> Batch:
  """At most the first `rows` examples."""
  if isinstance(examples, Source):
    return {name: values[:rows] for name, values in examples.arrays.items()}
  return next(_batches(evaluation(config, examples, min(rows, len(examples)))))


def predict(
  model: Model, variables: Variables, examples: Batches, batch_size: int = 256
) -> np.ndarray:
  """Logits [N, C] of all examples, in order."""
  logits = jax.jit(lambda v, batch: model.apply(*v, batch, train=False, key=None)[0]["logits"])
  return np.concatenate(
    [
      np.asarray(logits(variables, batch))[batch["where"]]
      for batch in _batches(examples, batch_size)
    ]
  )


def is_language(network: Trained, batch: Batch) -> bool:
  """Whether a model gives hidden states and a head in the place of logits."""
  model, variables = network
  outputs = jax.eval_shape(
    lambda v, b: model.apply(*v, b, train=False, key=None)[0], variables, batch
  )
  return "logits" not in outputs and "head" in outputs


def token_scores(
  network: Trained, examples: Batches, teacher: Trained | None = None, batch_size: int = 64
) -> dict[str, Any]:
  """`metrics.token_scores` of all examples, beside the teacher's."""

  def said(model, variables, batch):
    outputs = model.apply(*variables, batch, train=False, key=None)[0]
    return outputs["hidden"], outputs["head"]

  @jax.jit
  def scores(variables, teacher_variables, batch):
    teacher_outputs = None if teacher is None else said(teacher[0], teacher_variables, batch)
    hidden, head = said(network[0], variables, batch)
    return metrics.token_scores(
      hidden, head, batch["label"], batch["where"], teacher=teacher_outputs
    )

  teacher_variables = () if teacher is None else teacher[1]
  found = [scores(network[1], teacher_variables, batch) for batch in _batches(examples, batch_size)]
  return jax.device_get(reduce.merge(*found))


def known(examples: Batches) -> Known:
  """Labels, ids and images of all examples, in order; images that would take more than `SHOWN` bytes are left out."""
  if isinstance(examples, Source):
    return Known(examples.arrays["label"], examples.ids, examples.arrays.get("image"))
  found: dict[str, list[np.ndarray]] = {"label": [], "id": [], "image": []}
  size = 0
  for batch in _batches(examples):
    for name in ("label", "id"):
      found[name].append(batch[name][batch["where"]])
    size += batch["image"].size
    if size <= SHOWN:
      found["image"].append((255 * batch["image"][batch["where"]]).round().astype(np.uint8))
  images = np.concatenate(found["image"]) if size <= SHOWN else None
  return Known(np.concatenate(found["label"]), np.concatenate(found["id"]), images)


def _batches(examples: Batches, batch_size: int = 256) -> Iterator[HostBatch]:
  return data.eval_batches(examples, batch_size) if isinstance(examples, Source) else iter(examples)
