"""Combines sources: rows of one after rows of another, or the targets of two by the row's id."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from distill_jax.data.label_checks import UNLABELED
from distill_jax.data.source import Source
from distill_jax.data.split import hash_ids
from distill_jax.errors import join_first

_LARGEST = np.iinfo(np.int32).max


def concatenate(sources: Sequence[Source], *, name: str | None = None) -> Source:
  """Returns the rows of several sources as one, with new ids.

  The id of a row of source number i of n is n x its id + i, so it does not depend on which rows of
  the sources there are. A cache is written for the result, not for its parts.

  Args:
    sources: at least two, with the same entries, shapes of a row, classes and vocabulary.
    name: name of the result; None: their names, joined by '+'.

  Raises:
    ValueError: less than two sources, they differ in a field, or an id is above 2^31 - 1.

  >>> from distill_jax import data
  >>> real = data.Source({"id": np.array([3, 4]), "x": np.array([1.0, 2.0])}, name="real")
  >>> pseudo = data.Source({"id": np.array([4]), "x": np.array([5.0])}, name="pseudo")
  >>> both = data.concatenate([real, pseudo])
  >>> both.ids.tolist(), both.arrays["x"].tolist(), both.name
  ([6, 8, 9], [1.0, 2.0, 5.0], 'real+pseudo')
  """
  if isinstance(sources, Source) or len(sources) < 2:
    raise ValueError("sources: expected a list of at least two, got fewer: write [real, pseudo]")
  for other in sources[1:]:
    _check_alike("sources", sources[0], other)
  count = len(sources)
  ids = np.concatenate(
    [source.ids.astype(np.int64) * count + i for i, source in enumerate(sources)]
  )
  if ids.max() > _LARGEST:
    raise ValueError(
      f"id: expected ids up to {_LARGEST // count} of {count} sources, got {ids.max() // count}: "
      "number the rows anew"
    )
  arrays = {
    entry: np.concatenate([source.arrays[entry] for source in sources])
    for entry in sources[0].arrays
  }
  return dataclasses.replace(
    sources[0],
    arrays=arrays | {"id": ids},
    name="+".join(source.name for source in sources) if name is None else name,
    ignore_label=_ignore_label(*sources),
  )


def mix_labels(real: Source, pseudo: Source, fraction: float, seed: int = 0) -> Source:
  """Replaces the rows of a fraction of a source by those of another with the same ids.

  Which rows are replaced depends on their ids, `fraction` and `seed` only, and the rows of a
  smaller fraction are among those of a larger one. A row that `pseudo` does not have stays.

  Args:
    real: the source, such as with references as targets.
    pseudo: another one of its rows, such as of `cache.pseudo_labels`.
    fraction: the expected fraction of rows to replace, in [0, 1].
    seed: from 0 to 2^32 - 1.

  Raises:
    ValueError: `fraction` is not in [0, 1], the sources differ in a field, or `pseudo` has ids that
      `real` does not have.

  >>> from distill_jax import data
  >>> real = data.Source({"x": np.zeros(1000)})
  >>> pseudo = data.Source({"x": np.ones(1000)})
  >>> data.mix_labels(real, pseudo, 0.3).arrays["x"].mean().round(1)
  np.float32(0.3)
  """
  if not 0 <= fraction <= 1:
    raise ValueError(f"fraction: expected a number in [0, 1], got {fraction}")
  _check_alike("pseudo", real, pseudo)
  order = np.argsort(real.ids)
  rows = order[np.searchsorted(real.ids, pseudo.ids, sorter=order).clip(max=len(real) - 1)]
  unknown = pseudo.ids[real.ids[rows] != pseudo.ids]
  if unknown.size:
    raise ValueError(
      f"pseudo: expected ids of {real.name}, got {join_first(unknown)}: use data.concatenate for "
      "other rows"
    )
  is_replaced = hash_ids(pseudo.ids, seed, "mix_labels") < fraction
  arrays = {entry: values.copy() for entry, values in real.arrays.items()}
  for entry, values in arrays.items():
    values[rows[is_replaced]] = pseudo.arrays[entry][is_replaced]
  return dataclasses.replace(real, arrays=arrays, ignore_label=_ignore_label(real, pseudo))


def _ignore_label(*sources: Source) -> int | None:
  return UNLABELED if any(source.ignore_label is not None for source in sources) else None


def _check_alike(argument: str, first: Source, other: Source) -> None:
  """Raises ValueError unless two sources have the same fields, and rows of the same arrays."""
  for field in ("classes", "class_names", "vocabulary", "groups"):
    expected, got = getattr(first, field), getattr(other, field)
    if expected != got:
      raise ValueError(
        f"{argument}: expected {field} {_short(expected)} of {first.name}, got {_short(got)} of "
        f"{other.name}"
      )
  expected, got = (
    {name: (x.dtype, x.shape[1:]) for name, x in source.arrays.items()} for source in (first, other)
  )
  for entry in sorted(expected.keys() | got.keys()):
    if expected.get(entry) != got.get(entry):
      raise ValueError(
        f"{entry}: expected {_spec(expected.get(entry))} as in {first.name}, got "
        f"{_spec(got.get(entry))} in {other.name}: leave an entry out, or pad rows to one length"
      )


def _spec(spec: tuple[np.dtype, tuple[int, ...]] | None) -> str:
  return "no entry" if spec is None else f"{spec[0]} {list(spec[1])} in each row"


def _short(value: object) -> str:
  return join_first(value) if isinstance(value, tuple) else repr(value)
