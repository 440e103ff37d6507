"""Checks one imported row and brings it into one form; errors name its id, view and position.

The checks of log-probabilities are those that every true list of the most probable classes passes,
so what fails was computed or read wrongly. Each log-probability l may have been rounded to bfloat16
(relative error 2^-9, float16's is smaller), which changes a sum of probabilities p by at most
2^-9 sum(p |l|). Twice that, and `SLACK`, is allowed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from distill_jax.cache.codecs.top_k import NO_LABEL
from distill_jax.errors import check_integer

SLACK = 1e-4
ROUNDING = 2.0**-8
LOGITS = ("logits",)
TARGETS = ("indices", "logprobs")
LABELS = "label_logprobs"
OPTIONAL = {LABELS, "temperature"}


class RowSpec(NamedTuple):
  """What the values of every row must be.

  Attributes:
    shape: of one example's logits, (..., V).
    classes: number of leading classes that exist.
    k: number of classes that are stored of a list; 0: lists cannot be stored.
    temperature: of the lists.
  """

  shape: tuple[int, ...]
  classes: int
  k: int
  temperature: float = 1.0


class Targets(NamedTuple):
  """The k most probable classes at each position.

  Attributes:
    indices: int32 [..., k], most probable first.
    log_probs: float32 [..., k].
    log_odds: log of their probability over that of all other classes, float32 [...]; inf for none.
    label_log_prob: float32 [...], `NO_LABEL` where it is unknown.
  """

  indices: np.ndarray
  log_probs: np.ndarray
  log_odds: np.ndarray
  label_log_prob: np.ndarray


def row_name(id: Any, view: Any, position: Any = ()) -> str:
  """Returns how errors name a row: its id, its view, and a position in it.

  >>> row_name(7, 0, (3,))
  'rows: example id 7, view 0, position 3'
  """
  place = f", position {', '.join(map(str, position))}" if len(position) else ""
  return f"rows: example id {id}, view {view}{place}"


def check_row(spec: RowSpec, row: Any) -> tuple[int, int, np.ndarray | Targets]:
  """Returns id, view and values of one row, checked.

  Args:
    spec: what the values must be.
    row: `(id, view, values)`; see `import_rows`.

  Raises:
    ValueError: the row is something else, or its values are wrong.
  """
  if not (isinstance(row, tuple | list) and len(row) == 3 and isinstance(row[2], Mapping)):
    raise ValueError(
      f"rows: expected (id, view, mapping of arrays), got {type(row).__name__}: "
      'yield (7, 0, {"logits": array}), for example'
    )
  id = check_integer("rows: id", row[0])
  view = check_integer(f"rows: example id {id}: view", row[1])
  values = row[2]
  if set(values) == set(LOGITS):
    return id, view, _check_logits(spec, row_name(id, view), (id, view), values["logits"])
  if set(values) - OPTIONAL == set(TARGETS):
    return id, view, _check_targets(spec, (id, view), values)
  raise ValueError(
    f"{row_name(id, view)}: expected 'logits', or 'indices' and 'logprobs', got {sorted(values)}: "
    "name the arrays so"
  )


def _check_logits(spec: RowSpec, name: str, key: tuple[int, int], logits: Any) -> np.ndarray:
  logits = np.asarray(logits)
  if logits.dtype.kind not in "fV" or logits.shape != spec.shape:
    raise ValueError(
      f"{name}: expected floating logits of shape {spec.shape}, got {logits.dtype} "
      f"{logits.shape}: pass shape= to import_rows if the classes or the length differ from those "
      "of the source's labels"
    )
  with np.errstate(over="ignore"):
    logits = logits.astype(np.float32)
  is_wrong = np.isnan(logits) | (logits == np.inf)
  _reject(
    key,
    is_wrong.any(-1),
    "expected finite logits of float32, or -inf for no class",
    lambda at: f"{logits[at][is_wrong[at]][0]} for class {np.flatnonzero(is_wrong[at])[0]}",
    "compute the row again",
  )
  return logits


def _check_targets(spec: RowSpec, key: tuple[int, int], values: Mapping[str, Any]) -> Targets:
  name = row_name(*key)
  indices = np.asarray(values["indices"])
  log_probs = np.asarray(values["logprobs"])
  if not spec.k:
    raise ValueError(
      f"{name}: expected 'logits' for these codecs, got 'indices' and 'logprobs': "
      "store them with TopK"
    )
  if values.get("temperature", spec.temperature) != spec.temperature:
    raise ValueError(
      f"{name}: expected log-probabilities at temperature {spec.temperature:g}, that of the codec, "
      f"got {values['temperature']:g}: store TopK({spec.k}, temperature={values['temperature']:g})"
    )
  _check_shapes(spec, name, indices, log_probs)
  log_probs = log_probs.astype(np.float64)
  _check_numbers(key, log_probs)
  _check_indices(spec, key, indices)
  # As lax.top_k: of equally probable classes the first is first.
  order = np.lexsort((indices, -log_probs), axis=-1)
  indices = np.take_along_axis(indices, order, -1)
  log_probs = np.minimum(np.take_along_axis(log_probs, order, -1), 0)
  remaining = _check_masses(spec, key, log_probs)
  label_log_probs = _label_log_probs(key, log_probs, remaining, values.get(LABELS))
  log_probs = log_probs[..., : spec.k]
  probs = np.exp(log_probs)
  mass = probs.sum(-1)
  # 1 - mass alone is noise of float32 where nearly all mass is listed.
  tail = np.clip(1 - mass, 0, (spec.shape[-1] - spec.k) * probs[..., -1])
  with np.errstate(divide="ignore"):
    log_odds = np.log(mass) - np.log(tail)
  return Targets(
    indices[..., : spec.k].astype(np.int32),
    log_probs.astype(np.float32),
    log_odds.astype(np.float32),
    label_log_probs,
  )


def _check_shapes(spec: RowSpec, name: str, indices: np.ndarray, log_probs: np.ndarray) -> None:
  tokens = spec.shape[:-1]
  if indices.dtype.kind not in "iu" or log_probs.dtype.kind not in "fV":
    raise ValueError(
      f"{name}: expected integer 'indices' and floating 'logprobs', got {indices.dtype} and "
      f"{log_probs.dtype}: convert them"
    )
  if indices.shape != log_probs.shape or indices.shape[:-1] != tokens or not indices.ndim:
    raise ValueError(
      f"{name}: expected 'indices' and 'logprobs' of shape {(*tokens, 'K')}, one list for each "
      f"position of the example, got {indices.shape} and {log_probs.shape}: compute the row again "
      "from the tokens of the source"
    )
  if indices.shape[-1] < spec.k:
    raise ValueError(
      f"{name}: expected at least {spec.k} log-probabilities at each position for "
      f"TopK({spec.k}), got {indices.shape[-1]}: ask the teacher for more, or store TopK"
      f"({indices.shape[-1]})"
    )


def _check_numbers(key: tuple[int, int], log_probs: np.ndarray) -> None:
  is_nan = np.isnan(log_probs)
  _reject(
    key,
    is_nan.any(-1),
    "expected log-probabilities",
    lambda at: f"nan for entry {np.flatnonzero(is_nan[at])[0]}",
    "compute the row again",
  )
  highest = log_probs.max(-1)
  are_probabilities = (log_probs >= 0).all() and (log_probs <= 1).all()
  guess = "take their logarithms" if are_probabilities else "subtract logsumexp over all classes"
  kind = "probabilities" if are_probabilities else "logits or scores"
  _reject(
    key,
    highest > 1e-6,
    "expected log-probabilities of at most 0",
    lambda at: f"{highest[at]:g}",
    f"these may be {kind}: {guess}",
  )


def _check_indices(spec: RowSpec, key: tuple[int, int], indices: np.ndarray) -> None:
  is_unknown = (indices < 0) | (indices >= spec.classes)
  _reject(
    key,
    is_unknown.any(-1),
    f"expected classes 0 to {spec.classes - 1}",
    lambda at: f"{indices[at][is_unknown[at]][0]}",
    "the teacher may have another vocabulary",
  )
  ordered = np.sort(indices, -1)
  is_repeated = ordered[..., 1:] == ordered[..., :-1]
  _reject(
    key,
    is_repeated.any(-1),
    "expected each class once",
    lambda at: f"{ordered[at][1:][is_repeated[at]][0]} twice",
    "compute the row again",
  )


def _check_masses(spec: RowSpec, key: tuple[int, int], log_probs: np.ndarray) -> np.ndarray:
  """Checks the sum of the probabilities, and that no other class can be above the last listed.

  Returns what the probability of all other classes may be at most, up to rounding, [...].
  """
  probs = np.exp(log_probs)
  finite = np.where(probs > 0, log_probs, 0)
  mass = probs.sum(-1)
  slack = SLACK + ROUNDING * (probs * -finite).sum(-1)
  _reject(
    key,
    mass > 1 + slack,
    "expected probabilities that sum to at most 1",
    lambda at: f"a sum of {mass[at]:.4f}",
    "these may be logarithms of base 10 (multiply by log(10)), or of another temperature",
  )
  num_others = spec.shape[-1] - log_probs.shape[-1]
  tail = 1 - mass
  largest_tail = num_others * probs[..., -1] * np.exp(-ROUNDING * finite[..., -1])
  _reject(
    key,
    tail > largest_tail + slack,
    f"expected a remaining probability of at most {num_others} classes x the smallest listed one",
    lambda at: f"{tail[at]:.4g} above {largest_tail[at]:.4g}",
    "these may be logarithms of base 2 (multiply by log(2)), not the most probable classes, or "
    "scores without the normalizer of the full vocabulary",
  )
  return tail + slack


def _label_log_probs(
  key: tuple[int, int], log_probs: np.ndarray, remaining: np.ndarray, values: Any
) -> np.ndarray:
  """Returns the labels' log-probabilities as they are stored; NaN is unknown."""
  shape = log_probs.shape[:-1]
  if values is None:
    return np.full(shape, NO_LABEL, np.float32)
  values = np.asarray(values, np.float64)
  if values.shape != shape:
    raise ValueError(
      f"{row_name(*key)}: expected {LABELS!r} of shape {shape}, got {values.shape}: "
      "leave them out, or NaN where a label has none"
    )
  _reject(
    key,
    values > 1e-6,
    "expected log-probabilities of labels of at most 0",
    lambda at: f"{values[at]:g}",
    "compute the row again",
  )
  # A label is one of the listed classes, or one of the less probable others.
  probs = np.exp(log_probs)
  finite = np.where(probs > 0, log_probs, 0)
  slack = SLACK - ROUNDING * finite
  is_listed = (np.abs(np.exp(values)[..., None] - probs) <= slack * probs + 1e-12).any(-1)
  smallest = probs[..., -1] * (1 + slack[..., -1])
  largest = np.minimum(smallest, remaining)
  _reject(
    key,
    (np.exp(values) > largest) & ~is_listed,
    "expected a label's log-probability that is in the list or below it",
    lambda at: f"{values[at]:g}, and a list that ends with {log_probs[at][-1]:g}",
    "compute the row again, or leave the label's out",
  )
  return np.where(np.isnan(values), NO_LABEL, np.minimum(values, 0)).astype(np.float32)


def _reject(key: tuple[int, int], is_wrong: Any, expected: str, got: Any, hint: str) -> None:
  """Raises ValueError for the first position that is marked, [...]."""
  if is_wrong.any():
    at = tuple(int(i) for i in np.argwhere(is_wrong)[0])
    more = f" ({is_wrong.sum()} such positions of {is_wrong.size})" if at else ""
    raise ValueError(f"{row_name(*key, at)}: {expected}, got {got(at)}{more}: {hint}")
