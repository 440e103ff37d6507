"""How good a model is, as sums that merge across batches, hosts and devices, and what it costs to run."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import reduce
from distill_jax.losses import kl_divergence, linear_cross_entropy
from distill_jax.models.llm.decoder import logits as logits_of
from distill_jax.types import Batch, Variables


def counts(
  logits: jax.Array,
  labels: jax.Array,
  where: jax.Array | None = None,
  *,
  teacher_logits: jax.Array | None = None,
  bins: int = 15,
) -> dict[str, Any]:
  """Statistics of one batch; `reduce.merge` adds those of several, `summary` turns them into scores.

  Args:
    logits: [rows, classes], computed in float32 or wider.
    labels: int [rows]; a negative one is an example without a label, left out of all but the comparison
      with the teacher.
    where: bool [rows], the real rows; None: all.
    teacher_logits: [rows, classes], to compare with.
    bins: of the reliability diagram.

  Returns:
    Pairs (sum, count): 'accuracy', 'top5' (with more than 5 classes), 'nll' (nats) and, with a teacher,
    'agreement' (both predict the same class) and 'teacher_kl' (KL(teacher || student), nats);
    'confusion' int32 [classes, classes], rows labels, columns predictions; 'calibration' [bins, 3]:
    examples, sum of their confidence, number right. The lowest class wins a tie.

  Raises:
    ValueError: shapes differ, there are no rows, labels are not integers, or `where` is not bool.
  """
  _check(logits, labels, where, teacher_logits, bins)
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  rows, classes = logits.shape
  real = jnp.ones(rows, bool) if where is None else where
  label = jnp.where(labels >= 0, labels, 0)
  confusion = (
    jnp.zeros((classes, classes), jnp.int32).at[label, logits.argmax(-1)].add(real & (labels >= 0))
  )
  result = _scores(logits, labels, real, teacher_logits, bins) | {"confusion": confusion}
  if classes > 5:
    result["top5"] = reduce.total(_rank(logits, label) < 5, real & (labels >= 0))
  return result


def token_counts(
  hidden: jax.Array, head, labels: jax.Array, where: jax.Array | None = None
) -> dict[str, Any]:
  """Statistics of a language model's batch, from hidden states: no logits are made.

  Args:
    hidden: [rows, tokens, width].
    head: (kernel [width, V], bias or None, soft-cap or None).
    labels: the next tokens, int [rows, tokens]; negative ones do not count.
    where: bool [rows], the real rows; None: all.

  Returns:
    'nll': (sum in nats, number of tokens).
  """
  kernel, bias, softcap = head
  known = labels >= 0 if where is None else (labels >= 0) & where[:, None]
  weights = known.reshape(-1).astype(jnp.float32)
  label = jnp.where(known, labels, 0).reshape(-1)
  flat = hidden.reshape(-1, hidden.shape[-1])
  total = linear_cross_entropy(flat, kernel, label, weights=weights, bias=bias, softcap=softcap)
  return {"nll": (total, weights.sum())}


def token_scores(
  hidden: jax.Array,
  head,
  labels: jax.Array,
  where: jax.Array | None = None,
  *,
  teacher=None,
  bins: int = 15,
  memory: int = 2**26,
) -> dict[str, Any]:
  """As `counts`, of a language model's tokens that have a label; logits are made of some tokens at a time.

  Args:
    hidden, head, labels, where: as in `token_counts`.
    teacher: (hidden, head) of the teacher on the same tokens, to compare with; its vocabulary is the same.
    bins: of the reliability diagram.
    memory: bytes that one network's logits may take at once.

  Returns:
    Pairs 'accuracy', 'nll' and, with a teacher, 'agreement' and 'teacher_kl'; 'calibration'.

  Raises:
    ValueError: the vocabularies differ.
  """
  vocabulary = head[0].shape[1]
  if teacher is not None and teacher[1][0].shape[1] != vocabulary:
    raise ValueError(
      f"the teacher's vocabulary has {teacher[1][0].shape[1]} tokens, the student's {vocabulary}: expected the same"
    )
  known = labels >= 0 if where is None else (labels >= 0) & where[:, None]
  tokens = known.size
  chunk = min(tokens, max(1, memory // (4 * vocabulary)))

  def chunks(x):
    x = x.reshape(tokens, *x.shape[2:])
    return jnp.pad(x, ((0, -tokens % chunk),) + ((0, 0),) * (x.ndim - 1)).reshape(
      -1, chunk, *x.shape[1:]
    )

  def score(part):
    own, teacher_outputs, label, real = part
    logits = logits_of({"hidden": own, "head": head})
    teacher_logits = (
      None
      if teacher_outputs is None
      else logits_of({"hidden": teacher_outputs, "head": teacher[1]})
    )
    return _scores(logits, label, real, teacher_logits, bins)

  parts = (
    chunks(hidden),
    None if teacher is None else chunks(teacher[0]),
    chunks(labels),
    chunks(known),
  )
  return jax.tree.map(lambda x: x.sum(0), jax.lax.map(score, parts))


def summary(counts: Mapping[str, Any]) -> dict[str, float]:
  """Scores from (merged) `counts`, as Python floats.

  Returns:
    The means of the pairs in `counts` and
    'precision', 'recall', 'f1': macro averages over the classes that occur as label or prediction, 0 for a
    class where the ratio has no denominator (scikit-learn's average='macro', zero_division=0);
    'ece': expected calibration error (Guo et al. 2017, equation 3). 0 where nothing was counted.
    Of tokens, which have no confusion matrix, 'perplexity', the exponential of 'nll', in the place of the averages.
  """
  counts = jax.device_get(dict(counts))
  scores = {
    name: float(reduce.value(pair)) for name, pair in counts.items() if isinstance(pair, tuple)
  }
  if "calibration" in counts:
    scores["ece"] = _calibration_error(counts["calibration"])
  if "confusion" not in counts:
    # Without a token there is no perplexity; 1 would be the best of all.
    return scores | {
      "perplexity": float(np.exp(scores["nll"])) if counts["nll"][1] > 0 else math.nan
    }
  return scores | _macro(counts["confusion"])


def reliability(counts: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """A reliability diagram (Guo et al. 2017, figure 1) from (merged) `counts`.

  Returns:
    'edges' [bins + 1] of the confidence, and per bin (above its lower edge, up to its upper one) the
    'number' of examples, their mean 'confidence' and their 'accuracy'; both 0 in an empty bin.
  """
  number, confidence, right = np.asarray(counts["calibration"], np.float64).T
  filled = np.maximum(number, 1)
  edges = np.linspace(0, 1, len(number) + 1)
  return {
    "edges": edges,
    "number": number,
    "confidence": confidence / filled,
    "accuracy": right / filled,
  }


def cost(
  model_apply,
  variables: Variables,
  batch: Batch,
  *,
  repeats: int = 20,
  batch_sizes: Sequence[int] = (),
) -> dict[str, float]:
  """What it costs to run a model: its size, its arithmetic and its speed on the default device.

  The compiled program computes the logits (all outputs of a model that has none) in evaluation mode, so
  features that only distillation reads cost nothing.

  Args:
    model_apply: `Model.apply`.
    variables: its weights.
    batch: real or zero inputs; the first row is the one example.
    repeats: runs timed, after one that is not.
    batch_sizes: numbers of rows to be timed as well, made of the batch's rows over and over.

  Returns:
    'parameters': trained numbers; 'bytes': of params and state as they lie in memory; 'flops': of one
    example by XLA's count, which takes the body of a loop (`lax.scan`) once and a Pallas call as nothing;
    'latency_ms': median for one example; 'throughput': examples/s at the batch's size; 'throughput_128', ... at each
    of the `batch_sizes`.

  Raises:
    ValueError: `repeats` or a batch size is less than 1.
  """
  if repeats < 1:
    raise ValueError(f"repeats must be at least 1, got {repeats}")
  if any(size < 1 for size in batch_sizes):
    raise ValueError(f"batch_sizes must be at least 1 each, got {list(batch_sizes)}")

  @jax.jit
  def predict(params, state, batch):
    outputs, _ = model_apply(params, state, batch, train=False, key=None)
    return outputs.get("logits", outputs)

  many = {name: np.asarray(values) for name, values in batch.items()}
  rows = len(next(iter(many.values())))
  one = {name: values[:1] for name, values in many.items()}
  sizes = {size: {n: v[np.arange(size) % rows] for n, v in many.items()} for size in batch_sizes}
  analysis = predict.lower(*variables, one).compile().cost_analysis() or {}
  return {
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables.params)),
    "bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables)),
    "flops": float(analysis.get("flops", np.nan)),
    "latency_ms": 1e3 * _seconds(predict, variables, one, repeats),
    "throughput": rows / _seconds(predict, variables, many, repeats),
    **{f"throughput_{n}": n / _seconds(predict, variables, b, repeats) for n, b in sizes.items()},
  }


def _check(logits, labels, where, teacher_logits, bins):
  if logits.ndim != 2 or 0 in logits.shape:
    raise ValueError(
      f"logits must be [rows, classes] with at least one of each, got {list(logits.shape)}"
    )
  if labels.shape != logits.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
    expected = f"integers [{logits.shape[0]}], one per row of logits"
    raise ValueError(f"labels must be {expected}, got {labels.dtype} {list(labels.shape)}")
  if where is not None and (where.shape != labels.shape or where.dtype != jnp.bool_):
    raise ValueError(
      f"where must be bool {list(labels.shape)}, got {where.dtype} {list(where.shape)}"
    )
  if teacher_logits is not None and teacher_logits.shape != logits.shape:
    shapes = f"{list(teacher_logits.shape)}, the student's {list(logits.shape)}"
    raise ValueError(f"the teacher's logits are {shapes}: expected the same shape")
  if bins < 1:
    raise ValueError(f"bins must be at least 1, got {bins}")


def _scores(logits, labels, real, teacher_logits, bins) -> dict[str, Any]:
  """What `counts` and `token_scores` have in common, of logits [rows, classes] in float32 or wider."""
  labeled = real & (labels >= 0)
  label = jnp.where(labels >= 0, labels, 0)
  predicted = logits.argmax(-1)
  right = predicted == label
  log_probs = jax.nn.log_softmax(logits)
  nll = -jnp.take_along_axis(log_probs, label[:, None], -1)[:, 0]
  result: dict[str, Any] = {
    "accuracy": reduce.total(right, labeled),
    "nll": reduce.total(nll, labeled),
    "calibration": _calibration(jnp.exp(log_probs.max(-1)), right, labeled, bins),
  }
  if teacher_logits is not None:
    result["agreement"] = reduce.total(predicted == teacher_logits.argmax(-1), real)
    result["teacher_kl"] = reduce.total(kl_divergence(logits, teacher_logits), real)
  return result


def _rank(logits, label):
  """How many classes are predicted before the label; the last place if a logit is NaN."""
  own = jnp.take_along_axis(logits, label[:, None], -1)
  index = jnp.arange(logits.shape[-1])
  behind = (own > logits) | ((own == logits) & (label[:, None] < index))
  return logits.shape[-1] - 1 - behind.sum(-1)


def _calibration(confidence, right, labeled, bins):
  # Bins are open below and closed above, as in Guo et al. 2017.
  index = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
  columns = jnp.stack([jnp.ones_like(confidence), confidence, right.astype(confidence.dtype)], -1)
  columns = jnp.where(labeled[:, None], columns, 0)
  return jnp.zeros((bins, 3), columns.dtype).at[index].add(columns)


def _calibration_error(calibration) -> float:
  number, confidence, right = np.asarray(calibration, np.float64).T
  return float(np.abs(right - confidence).sum() / max(number.sum(), 1))


def _macro(confusion) -> dict[str, float]:
  confusion = np.asarray(confusion, np.float64)
  hits, predicted, actual = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
  occurs = predicted + actual > 0
  classes = max(occurs.sum(), 1)
  return {
    "precision": float((hits / np.maximum(predicted, 1)).sum() / classes),
    "recall": float((hits / np.maximum(actual, 1)).sum() / classes),
    "f1": float((2 * hits / np.maximum(predicted + actual, 1)).sum() / classes),
  }


def _seconds(predict, variables, batch, repeats) -> float:
  """Median time of one call, on inputs that are already on the device."""
  batch = jax.device_put(batch)
  jax.block_until_ready(predict(*variables, batch))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(predict(*variables, batch))
    times.append(time.perf_counter() - start)
  return float(np.median(times))
