"""Embeddings of sentences, images or anything else that is compared by similarity."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import reduce
from distill_jax.errors import check_integer
from distill_jax.objectives.calls import batch_entry, outputs_of
from distill_jax.tasks._correlations import correlations
from distill_jax.tasks._neighbors import (
  are_distinct,
  pairs_of,
  retrieval_scores,
  teacher_scores,
  unit_rows,
)
from distill_jax.types import CACHED, Batch, Metric, Outputs, Task


def embedding(
  *,
  output: str = "embedding",
  pair: str | None = None,
  score: str = "score",
  group: str | None = None,
  query: str | None = None,
  k: int = 10,
) -> Task:
  """Returns the task of embeddings [B, D] that are compared by their cosine.

  Its metrics, of all examples of the evaluation together:

  - with `pair`, 'spearman' and 'pearson': the correlation of the similarities of pairs of examples
    with their scores (scipy), as on STS;
  - with `group`, 'ndcg' and 'recall': of the k examples nearest to a query, those of its own group
    are relevant (scikit-learn's `ndcg_score`; the fraction of the relevant ones that is found).
    Queries without a relevant example do not count;
  - next to a teacher of any width, 'teacher_spearman': the correlation of both networks'
    similarities, of up to 50,000 pairs of examples, and 'neighbors': the fraction of the teacher's
    k nearest examples that are the student's, too.

  The first of these decides which weights are kept. Where all scores of pairs are equal there is no
  correlation; where all embeddings are equal, or one is not finite, all scores are NaN.

  Args:
    output: the output of both networks with the embeddings; a cached teacher's rides in the batch.
    pair: the batch's entry with the number of the pair, int [B], which two examples share; negative
      where an example is in none. None: no pairs have scores.
    score: the entry with the score of the pair, [B], equal in both examples.
    group: the entry with the number of the group, int [B]; negative where an example is relevant to
      none. None: nothing is retrieved.
    query: the entry that marks queries, bool [B]; all others are documents. None: each example is a
      query, and a document of all others.
    k: number of nearest examples.

  Raises:
    ValueError: `k` below 1, or `query` without `group`. When it is measured: an entry of another
      dtype or shape, a pair of one example or of three, or two scores of one pair.

  >>> import jax.numpy as jnp
  >>> from distill_jax import tasks
  >>> task = tasks.embedding(group="topic", k=1)
  >>> outputs = {"embedding": jnp.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [1.0, 1.0]])}
  >>> batch = {"topic": jnp.array([7, 7, 8, 8])}
  >>> scores = task.evaluate_predictions(task.predict(outputs, batch), batch)
  >>> scores["recall"]  # The last one is as near to the second as to the third, less 0.03.
  0.75
  """
  check_integer("k", k, 1)
  if query is not None and group is None:
    raise ValueError(
      f"query: expected none without group, got {query!r}: name the entry with the groups, too"
    )
  options = _Options(output, pair, score, group, query, k)
  return Task(
    metrics=options.metrics,
    statistics=functools.partial(_statistics, options),
    compute=lambda statistics: {},
    predict=functools.partial(_predict, options),
    evaluate_predictions=functools.partial(_evaluate_predictions, options),
    references=tuple(options.entries),
  )


class _Options(NamedTuple):
  """The arguments of `embedding`."""

  output: str
  pair: str | None
  score: str
  group: str | None
  query: str | None
  k: int

  @property
  def metrics(self) -> tuple[Metric, ...]:
    """Returns those that the arguments ask for."""
    of_pairs = (
      Metric("spearman", "Spearman correlation of similarities", short="Spearman"),
      Metric("pearson", "Pearson correlation of similarities", short="Pearson", detail=2),
    )
    of_groups = (
      Metric("ndcg", f"nDCG of the {self.k} nearest", "%", format=".2%", short=f"nDCG@{self.k}"),
      Metric(
        "recall", f"recall of the {self.k} nearest", "%", format=".2%", short=f"recall@{self.k}"
      ),
    )
    of_teacher = (
      Metric(
        "teacher_spearman",
        "Spearman correlation with the teacher's similarities",
        short="Spearman, teacher",
      ),
      Metric(
        "neighbors",
        f"common ones of the {self.k} nearest with the teacher",
        "%",
        format=".2%",
        short="neighbors",
      ),
    )
    return (
      *(of_pairs if self.pair is not None else ()),
      *(of_groups if self.group is not None else ()),
      *of_teacher,
    )

  @property
  def entries(self) -> dict[str, Any]:
    """Returns the batch's entries that are read, and their kind of numbers."""
    entries: dict[str | None, Any] = {self.pair: jnp.integer, self.group: jnp.integer}
    entries |= {self.query: jnp.bool_}
    if self.pair is not None:
      entries |= {self.score: jnp.number}
    return {name: kind for name, kind in entries.items() if name is not None}


def _statistics(
  options: _Options, outputs: Outputs, batch: Batch, teacher: Outputs | None
) -> dict[str, Any]:
  """Checks what the host will read, and counts rows: no score is a sum."""
  sides = {"student": outputs} | ({} if teacher is None else {"teacher": teacher})
  for side, some in sides.items():
    shape = outputs_of(some, options.output, side).shape
    if len(shape) != 2:
      raise ValueError(
        f"{options.output!r}: expected one embedding per row of the {side}, [rows, width], got "
        f"{shape}: take the mean of its tokens, or the first one"
      )
  rows = len(outputs[options.output])
  for name, kind in options.entries.items():
    entry = batch_entry(batch, name)
    if entry.shape != (rows,) or not jnp.issubdtype(entry.dtype, kind):
      raise ValueError(
        f"{name}: expected one {kind.__name__} per row, {(rows,)}, got {entry.dtype} "
        f"{entry.shape}: write .astype(np.int32), or `x > 0` for marks"
      )
  return {"rows": reduce.total(jnp.ones(rows), batch.get("where"))}


def _predict(options: _Options, outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
  rows = {"embedding": outputs_of(outputs, options.output, "student")}
  if f"{CACHED}{options.output}" in batch:
    rows["teacher"] = jnp.asarray(batch[f"{CACHED}{options.output}"])
  return {name: x.astype(jnp.float32) for name, x in rows.items()}


def _evaluate_predictions(
  options: _Options, predictions: Mapping[str, Any], references: Mapping[str, Any]
) -> dict[str, float]:
  unit = unit_rows(predictions["embedding"])
  is_defined = are_distinct(unit)
  scores: dict[str, float] = {}
  if options.pair is not None:
    scores |= _pair_scores(options, unit, references)
  if options.group is not None:
    is_query = None if options.query is None else np.asarray(references[options.query])
    scores |= retrieval_scores(unit, np.asarray(references[options.group]), is_query, options.k)
  if "teacher" in predictions:
    scores |= teacher_scores(unit, unit_rows(predictions["teacher"]), options.k)
  # Equal similarities have no order: which examples are nearest would be chance.
  return scores if is_defined or len(unit) < 2 else dict.fromkeys(scores, np.nan)


def _pair_scores(
  options: _Options, unit: np.ndarray, references: Mapping[str, Any]
) -> dict[str, float]:
  assert options.pair is not None
  pairs = pairs_of(np.asarray(references[options.pair]), options.pair)
  first, second = pairs.T
  values = np.asarray(references[options.score])
  if (values[first] != values[second]).any():
    index = (values[first] != values[second]).argmax()
    raise ValueError(
      f"{options.score}: expected one score of both examples of a pair, got "
      f"{values[pairs[index]].tolist()} of pair {references[options.pair][first[index]]}: repeat it"
    )
  return correlations(np.einsum("ij,ij->i", unit[first], unit[second]), values[first])
