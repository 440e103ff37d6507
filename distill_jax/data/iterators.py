"""Takes batches from any iterable: lists, generators, loaders of torch, grain and TensorFlow."""

from collections.abc import Mapping, Sequence
from typing import Any

from distill_jax.data.arrays import to_batch
from distill_jax.data.iterable_kinds import is_array
from distill_jax.data.pipeline import Pipeline
from distill_jax.data.source import Source


def from_iterable(
  iterable: Any, *, keys: Sequence[str] | None = None, epochs: int | None = None
) -> Source | Pipeline:
  """Returns a source or evaluation for `fit` from arrays or from anything that yields batches.

      loader = torch.utils.data.DataLoader(dataset, batch_size=64)  # yields (image, label)
      train = data.from_iterable(loader, keys=("image", "label"))

  `fit`, `evaluate` and `predict` call it themselves for batches that are dicts.

  Args:
    iterable: a dict of arrays, or with `keys` a tuple of arrays: a `Source` without `classes`.
      Or batches, each a dict of arrays (or a tuple of them, with `keys`):
      a list; a loader or data set of torch, grain or TensorFlow; a function that returns an
      iterator of one pass, such as a generator function; a function with an argument `start`, which
      returns the batches from that step on, without an end; or an iterator. Arrays may be those of
      any library that numpy reads.
    keys: names of the items of a batch that is a tuple, e.g. ("image", "label").
    epochs: number of passes in training; None: as many as there are steps.

  Returns:
    A `Source` for arrays, else a `Pipeline`. `Pipeline.load()` makes a `Source`, which
    `cache.write` needs, of its batches.

  Raises:
    ValueError: a path, a number or an array without a name; `epochs` is not for arrays, or is less
      than 1.

  >>> source = from_iterable({"image": np.zeros((4, 2)), "label": np.arange(4)})
  >>> batches = from_iterable([(np.zeros((4, 2)), np.arange(4))], keys=("image", "label"))
  >>> sorted(next(iter(batches)))
  ['image', 'label']
  """
  if hasattr(iterable, "keys") and hasattr(iterable, "__getitem__"):
    iterable = dict(iterable)  # Also a pandas data frame.
  is_arrays = isinstance(iterable, Mapping) or is_array(iterable)
  is_arrays |= isinstance(iterable, tuple) and all(map(is_array, iterable)) and bool(iterable)
  if epochs is not None and (is_arrays or not isinstance(epochs, int) or epochs < 1):
    expected = "None for arrays in memory" if is_arrays else "an integer >= 1"
    raise ValueError(f"epochs: expected {expected}, got {epochs!r}")
  if is_arrays:
    return Source(to_batch(iterable, keys))
  if isinstance(iterable, Source | Pipeline):
    if keys is not None or epochs is not None:
      raise ValueError(f"keys, epochs: expected None for a {type(iterable).__name__}, got others")
    return iterable
  return Pipeline(iterable, keys, epochs)
