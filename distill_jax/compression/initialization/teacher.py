"""Initializes a student from its teacher: layers copied by a map, wider arrays sliced, or factors.

    every_other = {rf"^layers/{i}/": f"layers/{2 * i}/" for i in range(6)}
    start = student.init(jax.random.key(0), batch)
    params, origins = init_from_teacher(
      start.params, teacher.variables.params, every_other | {r"^head/": "head/"}
    )
    fit(student, teacher, ..., student_variables=start._replace(params=params))

takes every other layer (DistilBERT, Sanh et al. 2019, section 2). `merge.merge` averages units
instead of slicing them, and `print(provenance.format_origins(origins))` lists the origin of each
array. Trees may be `Variables`, so that the running statistics of batch norm are included.
`optax.freeze(lambda params: trees.path_mask(params, pattern))` freezes these parameters; `fit`
warns of running statistics in these layers that still follow the student's batches.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.compression.initialization.provenance import Origin, Provenance
from distill_jax.errors import suggest
from distill_jax.trees import named_leaves
from distill_jax.types import Tree

Fit = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
"""`(teacher's array, shape of the student's) -> array of that shape`, or a ValueError."""


def copied(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Returns the array.

  Raises:
    ValueError: it has another shape.
  """
  if array.shape != shape:
    raise ValueError(
      f"expected the teacher's shape {list(array.shape)}, got {list(shape)}: fit=sliced takes a "
      "part"
    )
  return array


def sliced(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Returns evenly spaced slices of every axis (weight selection, Xu et al. 2024, section 3.2).

  Of n slices it takes m: those at i n / m where m divides n, and else at i (n - 1) / (m - 1),
  rounded. Equal pairs of lengths give equal slices, so that the outputs of one layer are the inputs
  of the next.

  Raises:
    ValueError: other ranks, or an axis longer than the teacher's.
  """
  if array.ndim != len(shape) or any(m > n for m, n in zip(shape, array.shape, strict=True)):
    raise ValueError(
      f"expected no axis longer than in the teacher's {list(array.shape)}, got {list(shape)}"
    )
  return array[np.ix_(*(_spaced(n, m) for n, m in zip(array.shape, shape, strict=True)))]


def projected(embedding: np.ndarray, width: int) -> Fit:
  """Returns a fit that projects onto the principal directions of the teacher's embedding.

      narrow = projected(teacher["embed"]["embedding"], 128)
      init_from_teacher(student, teacher, {"^embed/": "embed/", "^head$": "head"}, fit=narrow)

  gives the embedding whose inner products are nearest to the teacher's (Eckart & Young 1936), and
  the head that reads hidden states in the same directions.

  Args:
    embedding: [vocabulary, teacher's width].
    width: the student's width.

  Returns:
    A fit that projects each axis of another length from the teacher's width to the student's.

  Raises:
    ValueError: the embedding is no matrix, or has fewer directions than `width`.
  """
  if np.ndim(embedding) != 2 or not 1 <= width <= min(np.shape(embedding)):
    raise ValueError(
      f"embedding: expected [vocabulary, teacher's width] with at least width={width} of each, got "
      f"{list(np.shape(embedding))}"
    )
  directions = np.linalg.svd(np.asarray(embedding, np.float64), full_matrices=False)[2][:width]
  # A library may return either sign of a singular vector.
  largest = np.abs(directions).argmax(1)[:, None]
  directions = directions * np.sign(np.take_along_axis(directions, largest, 1))

  def fit(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    axes = [axis for axis, (n, m) in enumerate(zip(array.shape, shape)) if n != m]
    if array.ndim != len(shape) or any(
      (shape[a], array.shape[a]) != directions.shape for a in axes
    ):
      raise ValueError(
        f"expected the teacher's {list(array.shape)} with axes of {directions.shape[1]} projected "
        f"to {width}, got {list(shape)}"
      )
    for axis in axes:
      array = np.moveaxis(np.tensordot(array, directions, (axis, 1)), -1, axis)
    return array

  fit.__name__ = "projected"
  return fit


def init_from_teacher(
  student: Tree, teacher: Tree, layers: Mapping[str, str] | None = None, *, fit: Fit = copied
) -> tuple[Tree, Provenance]:
  """Returns a student's parameters with leaves of the teacher in them.

  Args:
    student: tree of arrays; leaves without a counterpart keep their values.
    teacher: tree of arrays.
    layers: `{pattern: replacement}`: the first pattern that `re.search` finds in a leaf's path is
      replaced there once, as by `re.sub`; the result is the path in the teacher. Leaves without a
      pattern keep their values. None: every leaf, from the same path.
    fit: `(teacher's array, shape) -> array`: `copied`, `sliced`, `projected(...)`, or any function
      that raises a ValueError for a shape it cannot give.

  Returns:
    (a tree of the student's structure and dtypes, the origin of each leaf).

  Raises:
    ValueError: a pattern that fits no leaf of the student; or leaves whose counterpart is missing
      or does not fit, with a line for each.
  """
  layers = {"": ""} if layers is None else layers
  student_leaves = dict(named_leaves(student))
  teacher_leaves = dict(named_leaves(teacher))
  _check_patterns(layers, student_leaves)
  values, origins, lines = {}, {}, []
  for name, leaf in student_leaves.items():
    shape = tuple(leaf.shape)
    source = _source(name, layers)
    values[name] = leaf
    origins[name] = Origin(shape)
    if source is None:
      continue
    if source not in teacher_leaves:
      lines.append(f"{name}: expected {source!r} in the teacher{suggest(source, teacher_leaves)}")
      continue
    array = np.asarray(teacher_leaves[source])
    try:
      values[name] = jnp.asarray(fit(array, shape), leaf.dtype)
    except ValueError as error:
      lines.append(f"{name} from {source}: {error}")
    origins[name] = Origin(shape, source, tuple(array.shape), getattr(fit, "__name__", "fit"))
  _raise_misfits(lines)
  return jax.tree.unflatten(jax.tree.structure(student), list(values.values())), origins


def init_from_factors(
  student: Tree, teacher: Tree, factors: Mapping[tuple[str, str], str]
) -> tuple[Tree, Provenance]:
  """Returns a student's parameters with pairs of kernels that are factors of the teacher's kernels.

  The factors give the best approximation of the teacher's kernel [inputs, outputs] of the pair's
  rank (Eckart & Young 1936), by its singular values s: first = U sqrt(s) [inputs, rank], second =
  sqrt(s) V' [rank, outputs].

  Args:
    student: tree of arrays; all other leaves keep their values.
    teacher: tree of arrays.
    factors: `{(path of the first, path of the second): path in the teacher}`.

  Returns:
    (a tree of the student's structure and dtypes, the origin of each leaf).

  Raises:
    ValueError: paths that do not exist and shapes that do not fit, with a line for each.
  """
  student_leaves = dict(named_leaves(student))
  teacher_leaves = dict(named_leaves(teacher))
  values = dict(student_leaves)
  origins = {name: Origin(tuple(leaf.shape)) for name, leaf in student_leaves.items()}
  lines = []
  for pair, source in factors.items():
    misfits = _factor_misfits(pair, source, student_leaves, teacher_leaves)
    lines += misfits
    if misfits:
      continue
    kernel = np.asarray(teacher_leaves[source])
    rank = student_leaves[pair[0]].shape[-1]
    for name, factor in zip(pair, _factorize(kernel, rank), strict=True):
      values[name] = jnp.asarray(factor, student_leaves[name].dtype)
      origins[name] = Origin(tuple(factor.shape), source, tuple(kernel.shape), "factorized")
  _raise_misfits(lines)
  return jax.tree.unflatten(jax.tree.structure(student), list(values.values())), origins


def _factor_misfits(
  pair: tuple[str, str], source: str, student: Mapping[str, jax.Array], teacher: Mapping
) -> list[str]:
  """Returns a line for each reason why a pair cannot be the factors of the teacher's kernel."""
  lines = [
    f"{name}: expected a leaf of the student{suggest(name, student)}"
    for name in pair
    if name not in student
  ]
  if source not in teacher:
    lines.append(f"{source}: expected a leaf of the teacher{suggest(source, teacher)}")
  if lines:
    return lines
  shape = np.shape(teacher[source])
  first, second = (tuple(student[name].shape) for name in pair)
  rank = first[-1]
  if len(shape) == 2 and (first, second) == ((shape[0], rank), (rank, shape[1])):
    if rank <= min(shape):
      return []
  return [
    f"{pair[0]}, {pair[1]}: expected [inputs, rank] and [rank, outputs] with a rank of at most "
    f"both, as factors of {source} {list(shape)}, got {list(first)} and {list(second)}"
  ]


def _factorize(kernel: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
  u, s, v = np.linalg.svd(kernel.astype(np.float64), full_matrices=False)
  root = np.sqrt(s[:rank])
  return u[:, :rank] * root, root[:, None] * v[:rank]


def _check_patterns(layers: Mapping[str, str], names: Iterable[str]) -> None:
  """Raises a ValueError for a pattern that is no regular expression or fits no leaf."""
  for pattern, replacement in layers.items():
    try:
      sources = [_source(name, {pattern: replacement}) for name in names]
    except (re.error, IndexError) as error:
      raise ValueError(
        f"layers: expected a substitution, got {pattern!r} to {replacement!r}: {error}"
      ) from error
    if all(source is None for source in sources):
      raise ValueError(
        f"layers: expected patterns of the student's leaves, {', '.join([*names][:8])}, ..., got "
        f"{pattern!r}"
      )


def _source(name: str, layers: Mapping[str, str]) -> str | None:
  """Returns the path in the teacher for a path of the student; None without a pattern for it."""
  for pattern, replacement in layers.items():
    if re.search(pattern, name):
      return re.sub(pattern, replacement, name, count=1)
  return None


def _spaced(n: int, m: int) -> np.ndarray:
  """Returns m evenly spaced indices of n."""
  return np.arange(m) * (n // m) if n % m == 0 else np.round(np.linspace(0, n - 1, m)).astype(int)


def _raise_misfits(lines: Sequence[str]) -> None:
  if lines:
    raise ValueError(
      "the teacher does not fit the student:" + "".join(f"\n  {line}" for line in lines)
    )
