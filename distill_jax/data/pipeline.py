"""Iterates over batches again and again, or from any step; a look at the first loses nothing."""

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from distill_jax.data.arrays import check_layout, layout, shape_change, to_batch
from distill_jax.data.batches import HostBatch
from distill_jax.data.checks import check_rows
from distill_jax.data.iterable_kinds import (
  check_iterable,
  has_state,
  is_endless,
  iterators_of,
  takes_start,
)
from distill_jax.data.source import Source

State = dict[str, Any]
_END = object()
MANY_BATCHES = 5_000


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
    length: number of batches of a list or tuple; None: they are not in memory.
    epochs: number of passes in training; None: as many as there are steps.
    identity: the iterable's `identity`, if it has one, or its name; a run that resumes compares it.

  >>> import numpy as np
  >>> from distill_jax import data
  >>> pipeline = data.from_iterable([{"x": np.zeros((8, 2))}, {"x": np.ones((8, 2))}])
  >>> pipeline.length
  2
  """

  def __init__(self, iterable: Any, keys: Sequence[str] | None = None, epochs: int | None = None):
    check_iterable(iterable)
    self.name = getattr(iterable, "__qualname__", type(iterable).__qualname__)
    self.identity = getattr(iterable, "identity", self.name)
    # Of torchvision's data sets it is a list of names.
    classes = getattr(iterable, "classes", None)
    self.classes = classes if isinstance(classes, int) else None
    self.length = len(iterable) if isinstance(iterable, list | tuple) else None
    self.epochs = epochs
    self._iterable = iterable
    self._keys = keys
    self._takes_start = callable(iterable) and takes_start(iterable)
    self._rewind = iterable.get_state() if has_state(iterable) else None
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
      item = next(iterator, _END)
      if item is _END:
        raise ValueError(
          f"source: expected at least one batch, got none from {self.name}: an iterator that was "
          "read before is empty; pass the function that makes it"
        )
      self._opened = (item, iterator, opened)
    return self._to_batch(self._opened[0], 0)

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

  @property
  def steps_per_epoch(self) -> int | None:
    """The number of batches of one pass; None where the iterable does not tell."""
    opened = self._iterable if self._opened is None else self._opened[2]
    if self._takes_start or is_endless(opened):
      return None
    try:
      return len(opened)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
      return None

  def shares_iterator(self, other: "Pipeline") -> bool:
    """Returns whether both read one iterator, so that each misses the other's batches."""
    others = iterators_of(other._iterable)
    return any(x is y for x in iterators_of(self._iterable) for y in others)

  def check_ends(self) -> None:
    """Checks that a pass has an end, as far as the iterable tells.

    Raises:
      ValueError: it is a function of `start`, or repeats.
    """
    opened = self._iterable if self._opened is None else self._opened[2]
    if self._takes_start or is_endless(opened):
      raise ValueError(
        f"source: expected batches that end, got {self.name}, which repeats them: leave repeat() "
        "out, or pass a function without an argument `start` that returns one pass"
      )

  def __iter__(self) -> Iterator[HostBatch]:
    """Iterates over the batches of one pass.

    Raises:
      ValueError: as `check_ends`; or there was a pass before, and this one is empty.
    """
    self.check_ends()
    return self._one_pass(self._layout is not None and self._opened is None)

  def _one_pass(self, was_read: bool) -> Iterator[HostBatch]:
    """Yields the batches of one pass; warns once if it seems to have no end."""
    number = -1
    for number, item in enumerate(self._pass(0)):
      if number == MANY_BATCHES and not hasattr(self._iterable, "__len__"):
        warnings.warn(
          f"source: read {number} batches of {self.name} without reaching an end: if it is "
          "endless, write itertools.islice(batches, number) in a function that returns one pass",
          stacklevel=2,
        )
      yield self._to_batch(item, number)
    if was_read and number < 0:
      raise ValueError(
        f"source: expected the batches of {self.name} again, got none: it reads an iterator that "
        "is empty after one pass: make a new iterator in each call, or pass a list"
      )

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
      return map(self._to_batch, self._pass(start), itertools.count(start))
    state, self._state = self._state, None
    reason = ""
    if start and state is not None:
      try:
        return self._passes(self._continue(state), state["epoch"], start)
      except ValueError as error:
        # Grain compares texts of the data source, which may hold an address.
        reason = f" (its stored position was rejected: {str(error).splitlines()[0]})"
    if start and self.length is None:
      warnings.warn(
        f"source: reads {start} batches of {self.name} again to resume at step {start}{reason}: "
        "the data equal an undisturbed run's only if every pass yields the same batches in the "
        "same order",
        stacklevel=2,
      )
    return itertools.islice(self._passes(), start, None)

  def get_state(self) -> State | None:
    """Returns the position of the training iteration, JSON values; None where it has no state."""
    if not has_state(self._iterator):
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
      change = shape_change(parts[-1], parts[0])
      if change:
        raise ValueError(f"source: {change} in batch {len(parts) - 1}, counted from 0")
    names = list(self.first() if not parts else parts[0])
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

  def _passes(
    self, rest: Iterator | None = None, epoch: int = 0, start: int = 0
  ) -> Iterator[HostBatch]:
    """Iterates over the batches of all passes from an epoch on, of which `rest` is left."""
    epochs = itertools.count(epoch) if self.epochs is None else range(epoch, self.epochs)
    numbers = itertools.count(start)
    for self._epoch in epochs:
      items = self._pass(0) if rest is None else rest
      rest = None
      is_empty = True
      for item in items:
        is_empty = False
        yield self._to_batch(item, next(numbers))
      if is_empty:
        return  # An iterator that can be read once: another pass would never end.

  def _continue(self, state: State) -> Iterator:
    """Returns an iterator of the rest of the pass that a state is in."""
    position = state["position"].encode() if state["is_bytes"] else state["position"]
    self._opened = None
    self._iterator = iter(self._open(0))
    self._iterator.set_state(position)  # type: ignore[attr-defined]
    return self._iterator

  def _to_batch(self, item: Any, number: int) -> HostBatch:
    """Returns a checked batch; errors say its number, in training that of the step minus 1."""
    try:
      batch = to_batch(item, self._keys)
      if self._layout is None:
        self._check_not_single(batch)
        self._layout = layout(batch)
      check_layout(batch, self._layout)
      check_rows(batch)
      return batch
    except ValueError as error:
      if not number:
        raise
      message = str(error).removeprefix("source: ")
      raise ValueError(
        f"source: batch {number} of {self.name}, counted from 0: {message}"
      ) from error

  def _check_not_single(self, batch: HostBatch) -> None:
    scalars = [name for name, values in batch.items() if values.ndim == 0]
    if scalars:
      raise ValueError(
        f"source: expected batches, got single examples from {self.name} ({scalars[0]!r} is a "
        "number): batch them, e.g. with torch's DataLoader(dataset, batch_size=64) or grain's "
        "dataset.batch(64)"
      )


def _chain(item: Any, iterator: Iterator) -> Iterator:
  """Yields the item and what is left of the iterator, without iter(), which would reset some."""
  while item is not _END:
    yield item
    item = next(iterator, _END)
