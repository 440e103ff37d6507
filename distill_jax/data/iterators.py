"""Takes batches from any iterable: lists, generators, loaders of torch, grain and TensorFlow."""

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from distill_jax.data.arrays import check_layout, layout, to_batch
from distill_jax.data.batches import HostBatch
from distill_jax.data.source import Source

State = dict[str, Any]


def from_iterable(
  iterable: Any, *, keys: Sequence[str] | None = None, epochs: int | None = None
) -> "Source | Pipeline":
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
  is_arrays = isinstance(iterable, Mapping) or _is_array(iterable)
  is_arrays |= isinstance(iterable, tuple) and all(map(_is_array, iterable)) and bool(iterable)
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


class Pipeline:
  """Batches of an iterable, from `from_iterable`: for training, evaluation and caches.

  `pipeline(start)` iterates over the training batches from step `start` on, pass after pass, and
  `iter(pipeline)` over those of one pass. The first batch is looked at before training, and
  nothing is lost by that: the next iteration begins with it.

  A run that resumes at step s continues exactly
    - where a grain iterator stood: its `get_state` is stored with each checkpoint;
    - with a function of `start`, if it returns the same batches again;
    - otherwise after s batches that are read again and left out. That is exact only if each pass
      yields the same batches in the same order, so it warns, except for lists.
  An iterator that can be read once cannot be resumed, nor evaluated on again and again.

  Attributes:
    name: name of the function, or type of the iterable.
    classes: the iterable's number of classes, if it has that attribute.
    is_list: whether the batches are in memory, a list or tuple.
    identity: the iterable's `identity`, if it has one, or its name; a run that resumes compares it.
  """

  def __init__(self, iterable: Any, keys: Sequence[str] | None = None, epochs: int | None = None):
    is_path = isinstance(iterable, str | bytes)
    if is_path or not (callable(iterable) or hasattr(iterable, "__iter__") or _has_items(iterable)):
      raise ValueError(
        f"source: expected a data.Source, a dict of arrays or batches that can be iterated, got "
        f"{type(iterable).__name__}: pass what data.from_iterable takes"
      )
    self.name = getattr(iterable, "__qualname__", type(iterable).__qualname__)
    self.identity = getattr(iterable, "identity", self.name)
    # Of torchvision's data sets it is a list of names.
    classes = getattr(iterable, "classes", None)
    self.classes = classes if isinstance(classes, int) else None
    self.is_list = isinstance(iterable, list | tuple)
    self._iterable = iterable
    self._keys = keys
    self._epochs = epochs
    self._takes_start = callable(iterable) and _takes_start(iterable)
    self._rewind = iterable.get_state() if _has_state(iterable) else None
    self._opened: tuple[Any, Iterator, Iterable] | None = None
    self._layout: dict[str, str] | None = None
    self._iterator: Iterator = iter(())
    self._epoch = 0
    self._state: State | None = None

  def first(self) -> HostBatch:
    """Returns the first batch; the next iteration begins with it.

    Raises:
      ValueError: there is none, or it is no batch.
    """
    if self._opened is None:
      opened = self._open(0)
      if not hasattr(opened, "__iter__"):
        raise ValueError(
          f"source: expected {self.name} to return an iterable of batches, got "
          f"{type(opened).__name__}"
        )
      iterator = iter(opened)
      item = next(iterator, None)
      if item is None:
        raise ValueError(
          f"source: expected at least one batch, got none from {self.name}: an iterator that was "
          "read before is empty; pass the function that makes it"
        )
      self._opened = (item, iterator, opened)
    batch = self._to_batch(self._opened[0])
    scalars = [name for name, values in batch.items() if values.ndim == 0]
    if scalars:
      raise ValueError(
        f"source: expected batches, got single examples from {self.name} ({scalars[0]!r} is a "
        "number): batch them, e.g. with torch's DataLoader(dataset, batch_size=64) or grain's "
        "dataset.batch(64)"
      )
    return batch

  @property
  def is_one_shot(self) -> bool:
    """Whether it can be read only once: an iterator, or what returns the same one each time."""
    if self._rewind is not None:
      return False
    if isinstance(self._iterable, Iterator):
      return True
    self.first()
    assert self._opened is not None
    _, iterator, opened = self._opened
    again = self._open(0)
    if isinstance(again, Iterator):
      return again is opened
    # Those of loaders may start over, and would do so here: torch's with persistent workers.
    is_pythons = type(iterator).__module__ in ("builtins", "itertools")
    return is_pythons and iter(again) is iterator

  def __iter__(self) -> Iterator[HostBatch]:
    """Iterates over the batches of one pass."""
    return map(self._to_batch, self._pass(0))

  def __call__(self, start: int) -> Iterator[HostBatch]:
    """Iterates over training batches from step `start` on.

    Raises:
      ValueError: `start` is not 0, and the iterable can be read only once.
    """
    if start and self.is_one_shot:
      raise ValueError(
        f"source: expected batches that can be read again, to resume at step {start}, got "
        f"{self.name}, which can be read once: pass the function that makes it, or a list"
      )
    if self._takes_start:
      return map(self._to_batch, self._pass(start))
    state, self._state = self._state, None
    reason = ""
    if start and state is not None:
      try:
        return self._passes(self._continue(state), state["epoch"])
      except ValueError as error:
        # Grain compares texts of the data source, which may hold an address.
        reason = f" (its stored position was rejected: {str(error).splitlines()[0]})"
    if start and not self.is_list:
      warnings.warn(
        f"source: reads {start} batches of {self.name} again to resume at step {start}{reason}: "
        "the data equal an undisturbed run's only if every pass yields the same batches in the "
        "same order",
        stacklevel=2,
      )
    return itertools.islice(self._passes(), start, None)

  def get_state(self) -> State | None:
    """Returns the position of the training iteration, JSON values; None where it has no state."""
    if not _has_state(self._iterator):
      return None
    position = self._iterator.get_state()  # type: ignore[attr-defined]
    is_bytes = isinstance(position, bytes)
    return {
      "epoch": self._epoch,
      "position": position.decode() if is_bytes else position,
      "is_bytes": is_bytes,
    }

  def set_state(self, state: State | None) -> None:
    """Sets the position at which the next call with `start` > 0 begins; None: none."""
    self._state = state

  def load(self) -> Source:
    """Returns the examples of one pass in a `Source`, in memory.

    Without an entry 'id' the examples are numbered in the order of this pass. Rows that 'where'
    leaves out are dropped.
    """
    parts = []
    for batch in self:
      where = batch.pop("where", None)
      batch.pop("view", None)
      parts.append(batch if where is None else {name: x[where] for name, x in batch.items()})
    names = list(self.first()) if not parts else list(parts[0])
    for part in parts:
      if set(part) != set(names):
        raise ValueError(f"source: expected batches of {sorted(names)}, got one of {sorted(part)}")
    return Source({name: np.concatenate([part[name] for part in parts]) for name in names})

  def _open(self, start: int) -> Iterable:
    if self._takes_start:
      return self._iterable(start)
    if self._rewind is not None:
      self._iterable.set_state(self._rewind)
      return self._iterable
    return self._iterable() if callable(self._iterable) else self._iterable

  def _pass(self, start: int) -> Iterator:
    """Returns an iterator of the items of one pass; of the one that was looked at, if it is new."""
    if self._opened is not None and not start:
      (item, self._iterator, _), self._opened = self._opened, None
      return _chain(item, self._iterator)
    self._opened = None
    self._iterator = iter(self._open(start))
    return self._iterator

  def _passes(self, rest: Iterator | None = None, epoch: int = 0) -> Iterator[HostBatch]:
    """Iterates over the batches of all passes from an epoch on, of which `rest` is left."""
    epochs = itertools.count(epoch) if self._epochs is None else range(epoch, self._epochs)
    for self._epoch in epochs:
      items = self._pass(0) if rest is None else rest
      rest = None
      is_empty = True
      for item in items:
        is_empty = False
        yield self._to_batch(item)
      if is_empty:
        return  # An iterator that can be read once: another pass would never end.

  def _continue(self, state: State) -> Iterator:
    """Returns an iterator of the rest of the pass that a state is in."""
    position = state["position"].encode() if state["is_bytes"] else state["position"]
    self._opened = None
    self._iterator = iter(self._open(0))
    self._iterator.set_state(position)  # type: ignore[attr-defined]
    return self._iterator

  def _to_batch(self, item: Any) -> HostBatch:
    batch = to_batch(item, self._keys)
    self._layout = self._layout or layout(batch)
    check_layout(batch, self._layout, self.name)
    return batch


def _chain(item: Any, iterator: Iterator) -> Iterator:
  """Yields the item and what is left of the iterator, without iter(), which would reset some."""
  while item is not None:
    yield item
    item = next(iterator, None)


def _takes_start(function: Callable) -> bool:
  """Returns whether a function is one of the first step, not of nothing."""
  try:
    parameters = inspect.signature(function).parameters.values()
  except ValueError:
    return True
  positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
  return any(p.default is p.empty or p.name == "start" for p in positional)


def _has_state(iterator: Any) -> bool:
  is_iterator = isinstance(iterator, Iterator)
  return is_iterator and hasattr(iterator, "get_state") and hasattr(iterator, "set_state")


def _has_items(iterable: Any) -> bool:
  return hasattr(iterable, "__getitem__") and hasattr(iterable, "__len__")


def _is_array(values: Any) -> bool:
  return hasattr(values, "shape") and hasattr(values, "dtype")
