"""Nearest neighbors and similarities of embeddings, on the host."""

from collections.abc import Iterator

import numpy as np

from distill_jax.tasks._correlations import correlations

MAX_PAIRS = 50_000
"""Pairs of rows whose similarities are compared with the teacher's; of more a random part is."""
_CHUNK = 1024
_EQUAL = 1e-6  # Rows of norm 1 that are multiples of one another differ by rounding.
_SELF = -2.0  # below any cosine


def unit_rows(embedding: np.ndarray) -> np.ndarray:
  """Returns rows over their L2 norm, float32 [N, D]; a row of zeros stays."""
  embedding = np.asarray(embedding, np.float32)
  norm = np.linalg.norm(embedding, axis=1, keepdims=True)
  return embedding / np.where(norm > 0, norm, 1)


def are_distinct(embedding: np.ndarray) -> bool:
  """Returns whether rows define neighbors: all are finite, and not all of them are equal."""
  return bool(np.isfinite(embedding).all() and (np.ptp(embedding, axis=0) > _EQUAL).any())


def pairs_of(numbers: np.ndarray, name: str) -> np.ndarray:
  """Returns the rows of each pair, int [pairs, 2].

  Args:
    numbers: int [N], that of each row's pair; negative: none.
    name: of the entry, for messages.

  Raises:
    ValueError: a number occurs once, or more than twice.
  """
  rows = np.flatnonzero(numbers >= 0)
  values, counts = np.unique(numbers[rows], return_counts=True)
  if (counts != 2).any():
    index = (counts != 2).argmax()
    raise ValueError(
      f"{name}: expected two examples of each pair, got {counts[index]} of pair {values[index]}: "
      "keep both sentences of a pair in one split (data.Source(groups=)), or write -1"
    )
  return rows[np.argsort(numbers[rows], kind="stable")].reshape(-1, 2)


def retrieval_scores(
  unit: np.ndarray, groups: np.ndarray, is_query: np.ndarray | None, k: int
) -> dict[str, float]:
  """Returns 'ndcg' and 'recall' of the k nearest documents of each query; {} without a query that
  has a relevant document.

  Args:
    unit: rows of norm 1, [N, D].
    groups: int [N]; documents of the query's own number are relevant. Negative: none is.
    is_query: bool [N], queries; all others are documents. None: each row is a query, and a document
      of all others.
    k: number of documents.
  """
  queries = np.arange(len(unit)) if is_query is None else np.flatnonzero(is_query)
  documents = np.arange(len(unit)) if is_query is None else np.flatnonzero(~is_query)
  queries = queries[groups[queries] >= 0]
  discount = 1 / np.log2(np.arange(2, k + 2))
  ndcg, recall = [], []
  for rows, nearest in _nearest(unit, queries, documents, k):
    relevant = groups[rows][:, None] == groups[documents]
    relevant &= rows[:, None] != documents
    number = relevant.sum(1)
    hits = np.take_along_axis(relevant, nearest, 1)[number > 0]
    number = number[number > 0]
    ideal = np.cumsum(discount)[np.minimum(number, k) - 1]
    ndcg.append((hits * discount[: hits.shape[1]]).sum(1) / ideal)
    recall.append(hits.sum(1) / number)
  if not sum(map(len, ndcg)):
    return {}
  parts = {"ndcg": ndcg, "recall": recall}
  return {name: float(np.concatenate(values).mean()) for name, values in parts.items()}


def teacher_scores(student: np.ndarray, teacher: np.ndarray, k: int) -> dict[str, float]:
  """Returns how far the student's similarities and neighbors are the teacher's; {} of one row.

  Args:
    student, teacher: rows of norm 1, [N, D] of any width each.
    k: number of neighbors.
  """
  rows = np.arange(len(student))
  k = min(k, len(rows) - 1)
  if k < 1:
    return {}
  common = [
    (first[:, :, None] == second[:, None]).any(2).mean(1)
    for (_, first), (_, second) in zip(*(_nearest(x, rows, rows, k) for x in (student, teacher)))
  ]
  first, second = _some_pairs(len(rows))
  similarities = [np.einsum("ij,ij->i", x[first], x[second]) for x in (student, teacher)]
  correlation = correlations(*similarities)
  scores = {"neighbors": float(np.concatenate(common).mean())}
  return scores | ({"teacher_spearman": correlation["spearman"]} if correlation else {})


def _nearest(
  unit: np.ndarray, queries: np.ndarray, documents: np.ndarray, k: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields some queries, and the positions among the documents of their k nearest, nearest first; a
  row is no neighbor of its own.
  """
  for start in range(0, len(queries), _CHUNK):
    rows = queries[start : start + _CHUNK]
    similarity = unit[rows] @ unit[documents].T
    similarity[rows[:, None] == documents] = _SELF
    size = min(k, len(documents))
    nearest = (
      np.argpartition(-similarity, size - 1, axis=1)[:, :size]
      if size
      else np.zeros((len(rows), 0), int)
    )
    order = np.argsort(-np.take_along_axis(similarity, nearest, 1), axis=1, kind="stable")
    yield rows, np.take_along_axis(nearest, order, 1)


def _some_pairs(rows: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns all pairs of different rows, or `MAX_PAIRS` random ones."""
  if rows * (rows - 1) // 2 <= MAX_PAIRS:
    first, second = np.triu_indices(rows, 1)
    return first, second
  rng = np.random.default_rng(0)
  first = rng.integers(0, rows, MAX_PAIRS)
  return first, (first + rng.integers(1, rows, MAX_PAIRS)) % rows
