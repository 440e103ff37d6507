"""Starting a student from its teacher's weights: layers copied by a map, wider arrays sliced, kernels factorized.

    every_other = {rf"^layers/{i}/": f"layers/{2 * i}/" for i in range(6)}
    params, origins = inject(student, teacher, every_other | {r"^head/": "head/"})

takes every other layer (DistilBERT, Sanh et al. 2019, section 2). `merge` averages units in place of slices, and
`print(provenance.describe(origins))` says which array came from where. Trees may be `Variables`, so that the running
statistics of batch norm come along. To hold what was injected: `optax.freeze(lambda p: paths.matching(p, pattern))`.
That holds parameters alone: the running statistics of batch norm are state, and go on moving to the student's batches.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.compression.initialization.provenance import Origin, Provenance
from distill_jax.errors import suggest
from distill_jax.trees import named_leaves
from distill_jax.types import Tree

Fit = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def copied(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """The array as it is.

  Raises:
    ValueError: it has another shape.
  """
  if array.shape != shape:
    raise ValueError(
      f"expected the teacher's shape {list(array.shape)}; fit=sliced takes a part of it"
    )
  return array


def sliced(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Evenly spaced slices of every axis (uniform weight selection, Xu et al. 2024, section 3.2).

  Of n the m at i n / m where m divides n, and else at i (n - 1) / (m - 1), rounded. Axes of one length here and there
  are sliced alike, so that the outputs of one layer are the inputs of the next.

  Raises:
    ValueError: other ranks, or an axis longer than the teacher's.
  """
  if array.ndim != len(shape) or any(m > n for m, n in zip(shape, array.shape, strict=True)):
    raise ValueError(
      f"cannot be sliced from the teacher's {list(array.shape)}: no axis may be longer there"
    )
  return array[np.ix_(*(_evenly(n, m) for n, m in zip(array.shape, shape, strict=True)))]


def projected(embedding: np.ndarray, width: int) -> Fit:
  """Fits arrays to a narrower network by the principal directions of the teacher's embedding, the same for all.

      narrow = projected(teacher["embed"]["embedding"], 128)
      inject(student, teacher, {"^embed/": "embed/", "^head$": "head"}, fit=narrow)

  gives the embedding whose inner products are nearest to the teacher's (Eckart & Young 1936), and the head that reads
  hidden states in the same directions.

  Args:
    embedding: [vocabulary, the teacher's width].
    width: of the student.

  Returns:
    For `inject`: it projects the axes that differ, from the teacher's width to the student's.

  Raises:
    ValueError: the embedding is no matrix, or has fewer directions than `width`.
  """
  if np.ndim(embedding) != 2 or not 1 <= width <= min(np.shape(embedding)):
    raise ValueError(
      f"embedding, width: expected [vocabulary, teacher's width] with at least width={width} of each, got "
      f"{list(np.shape(embedding))}"
    )
  directions = np.linalg.svd(np.asarray(embedding, np.float64), full_matrices=False)[2][:width]
  # The sign of a singular vector is the library's choice.
  largest = np.abs(directions).argmax(1)[:, None]
  directions = directions * np.sign(np.take_along_axis(directions, largest, 1))

  def fit(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    differ = [axis for axis, (n, m) in enumerate(zip(array.shape, shape)) if n != m]
    if array.ndim != len(shape) or any(
      (shape[a], array.shape[a]) != directions.shape for a in differ
    ):
      raise ValueError(
        f"cannot be projected from the teacher's {list(array.shape)}: axes may differ as {directions.shape[1]} "
        f"there and {width} here"
      )
    for axis in differ:
      array = np.moveaxis(np.tensordot(array, directions, (axis, 1)), -1, axis)
    return array

  fit.__name__ = "projected"
  return fit


def inject(
  student: Tree, teacher: Tree, layers: Mapping[str, str] | None = None, *, fit: Fit = copied
) -> tuple[Tree, Provenance]:
  """A student's parameters with the teacher's in them.

  Args:
    student, teacher: trees of arrays.
    layers: `{pattern: replacement}`: the first pattern (`re.search`) found in a leaf's path is replaced there once, as
      by `re.sub`, and what comes out is the path in the teacher. Leaves without one stay as they are. None: every
      leaf, from the same path.
    fit: `(teacher's array, shape) -> array`: `copied`, `sliced`, or a function of yours that raises a ValueError.

  Returns:
    (a tree of the student's structure and dtypes, where each of its leaves came from).

  Raises:
    ValueError: a pattern that fits no leaf of the student; or leaves whose counterpart is missing or does not fit: each
      has a line.
  """
  layers = {"": ""} if layers is None else layers
  own, theirs = dict(named_leaves(student)), dict(named_leaves(teacher))
  sources = _sources(own, layers)
  values, origins, lines = {}, {}, []
  for name, leaf in own.items():
    source = sources[name]
    values[name], origins[name] = leaf, Origin(tuple(leaf.shape))
    if source is None:
      continue
    if source not in theirs:
      lines.append(f"{name}: the teacher has no {source!r}{suggest(source, theirs)}")
      continue
    try:
      values[name] = jnp.asarray(fit(np.asarray(theirs[source]), tuple(leaf.shape)), leaf.dtype)
    except ValueError as error:
      lines.append(f"{name} {list(leaf.shape)} from {source}: {error}")
    origins[name] = Origin(
      tuple(leaf.shape), source, tuple(theirs[source].shape), getattr(fit, "__name__", "fit")
    )
  _raise(lines)
  return jax.tree.unflatten(jax.tree.structure(student), list(values.values())), origins


def inject_factors(
  student: Tree, teacher: Tree, factors: Mapping[tuple[str, str], str]
) -> tuple[Tree, Provenance]:
  """A student's pairs of kernels as the factors of the teacher's.

  The best approximation of the teacher's kernel [inputs, outputs] of the pair's rank (Eckart & Young 1936), by its
  singular values s: first = U sqrt(s) [inputs, rank], second = sqrt(s) V' [rank, outputs].

  Args:
    student, teacher: trees of arrays.
    factors: `{(path of the first, path of the second): path in the teacher}`.

  Returns:
    As `inject`; chain them where both are wanted.

  Raises:
    ValueError: as `inject`, for paths that are not there and shapes that do not fit.
  """
  own, theirs = dict(named_leaves(student)), dict(named_leaves(teacher))
  values, lines = dict(own), []
  origins = {name: Origin(tuple(leaf.shape)) for name, leaf in own.items()}
  for (first, second), source in factors.items():
    missing = [
      f"the student has no {name!r}{suggest(name, own)}"
      for name in (first, second)
      if name not in own
    ]
    missing += (
      [] if source in theirs else [f"the teacher has no {source!r}{suggest(source, theirs)}"]
    )
    if missing:
      lines += missing
      continue
    kernel, shapes = np.asarray(theirs[source]), (tuple(own[first].shape), tuple(own[second].shape))
    rank = shapes[0][-1]
    if (
      kernel.ndim != 2
      or shapes != ((kernel.shape[0], rank), (rank, kernel.shape[1]))
      or rank > min(kernel.shape)
    ):
      lines.append(
        f"{first} {list(shapes[0])} and {second} {list(shapes[1])} are no factors of {source} {list(kernel.shape)}: "
        "expected [inputs, rank] and [rank, outputs], the rank no more than either"
      )
      continue
    u, s, v = np.linalg.svd(kernel.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:rank])
    for name, value in ((first, u[:, :rank] * root), (second, root[:, None] * v[:rank])):
      values[name] = jnp.asarray(value, own[name].dtype)
      origins[name] = Origin(tuple(own[name].shape), source, tuple(kernel.shape), "factorized")
  _raise(lines)
  return jax.tree.unflatten(jax.tree.structure(student), list(values.values())), origins


def _sources(own: Iterable[str], layers: Mapping[str, str]) -> dict[str, str | None]:
  """The path in the teacher for each of the student's."""
  for pattern, replacement in layers.items():
    try:
      found = [
        re.sub(pattern, replacement, name, count=1) for name in own if re.search(pattern, name)
      ]
    except (re.error, IndexError) as error:
      raise ValueError(
        f"layers: {pattern!r} to {replacement!r} is no substitution: {error}"
      ) from error
    if not found:
      raise ValueError(
        f"layers: {pattern!r} fits no leaf of the student; some are {', '.join([*own][:8])}"
      )
  return {name: _source(name, layers) for name in own}


def _source(name: str, layers: Mapping[str, str]) -> str | None:
  for pattern, replacement in layers.items():
    if re.search(pattern, name):
      return re.sub(pattern, replacement, name, count=1)
  return None


def _evenly(n: int, m: int) -> np.ndarray:
  return np.arange(m) * (n // m) if n % m == 0 else np.round(np.linspace(0, n - 1, m)).astype(int)


def _raise(lines: Iterable[str]) -> None:
  if lines:
    raise ValueError(
      "the teacher does not fit the student:" + "".join(f"\n  {line}" for line in lines)
    )
