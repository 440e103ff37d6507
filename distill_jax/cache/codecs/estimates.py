"""Measures what each codec costs and loses on a sample of a teacher's logits."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses
from distill_jax.cache.codecs import output_errors
from distill_jax.cache.codecs.codec import Codec
from distill_jax.cache.codecs.codes import Codes
from distill_jax.cache.codecs.dense_codec import Dense
from distill_jax.cache.codecs.random_sampling import RandomSampling
from distill_jax.cache.codecs.top_k import TopK
from distill_jax.cache.teacher.lazy_logits import LazyLogits, compute_logits

MAX_TOKENS = 512  # of a language model's sample

# The default loss of each codec is first.
LOSSES: dict[type, list[Callable[..., jax.Array]]] = {
  Dense: [losses.kl_divergence],
  TopK: [losses.sparse_kl, losses.sparse_kl_conditional, losses.sparse_kl_smoothed],
  RandomSampling: [losses.sampled_cross_entropy],
}
HEADER = "codec", "bytes", "mass", "5 % quantile", "cosine", "conditional", "smoothed"


class Estimate(NamedTuple):
  """The cost and the loss of one codec on the sample.

  Attributes:
    codec: the measured codec.
    bytes: per example (and view), without the ids and checksums of the cache.
    mass: mean and 5th percentile of the stored classes' probability at the codec's temperature;
      NaN for random samples, 1 for a dense codec.
    cosines: by loss, cosine between its gradient (of the decoded targets) and that of the full KL,
      both of the sample's mean with respect to the student's logits. Random samples have a noisy
      gradient whose mean over many steps is exact, so compare top k only with top k.

  Example in `estimate`.
  """

  codec: Codec
  bytes: int
  mass: tuple[float, float]
  cosines: dict[str, float]


def default_codecs(classes: int, *, temperature: float = 1.0) -> list[Codec]:
  """Returns codecs to compare for a teacher with so many classes."""
  codecs: list[Codec] = [Dense("float16"), Dense("int8")]
  codecs += [TopK(k, temperature) for k in (1, 4, 16, 64) if k <= classes]
  return codecs + [RandomSampling(k, temperature) for k in (12, 50)]


def row_bytes(codec: Codec, output: Any) -> int:
  """Returns the bytes per example of an output, or `ShapeDtypeStruct`, [B, ...].

  >>> from distill_jax import cache
  >>> logits = jax.ShapeDtypeStruct((1, 32_000), jnp.float32)
  >>> {k: cache.row_bytes(cache.TopK(k), logits) for k in (8, 64)}
  {8: 32, 64: 192}
  """
  return sum(dtype.itemsize * math.prod(shape) for dtype, shape in codec.columns(output).values())


def top_k_mass(logits: jax.Array, k: int, *, temperature: float = 1.0) -> tuple[float, float]:
  """Returns mean and 5th percentile, over rows [..., V], of the k largest probabilities' sum."""
  log_tail = losses.top_k(logits, k, temperature=temperature).log_tail
  mass = np.asarray(-jnp.expm1(log_tail), np.float64)
  return float(mass.mean()), float(np.percentile(mass, 5))


def estimate(
  teacher: Any,
  student: Any = None,
  *,
  temperature: float = 1.0,
  codecs: Sequence[Codec] | None = None,
) -> list[Estimate]:
  """Measures codecs on a sample.

  Args:
    teacher: logits [N, ..., V] of some hundred examples; of `LazyLogits` some tokens are used.
    student: logits of the same shape, at which the gradients are taken; None: zeros, an untrained
      student.
    temperature: of the loss and of `default_codecs`; a codec with a temperature is compared with
      the full KL at its own.
    codecs: to measure; None: `default_codecs`.

  Raises:
    ValueError: logits that are empty or not finite, shapes that differ, or a codec that cannot
      store such logits.

  >>> from distill_jax import cache
  >>> logits = np.array([[8.0, 2.0, 0.0, 0.0], [0.0, 0.0, 8.0, 1.0]], np.float32)
  >>> (estimate,) = cache.estimate(logits, codecs=[cache.Dense("float16")])
  >>> estimate.bytes, round(estimate.cosines["kl_divergence"], 3)  # bytes per example
  (8, 1.0)
  """
  teacher = _some_tokens(teacher) if isinstance(teacher, LazyLogits) else jnp.asarray(teacher)
  _check_logits(teacher)
  student = jnp.zeros_like(teacher) if student is None else jnp.asarray(student)
  if not (math.isfinite(temperature) and temperature > 0):
    raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")
  if codecs is None:
    codecs = default_codecs(teacher.shape[-1], temperature=temperature)
  _check_codecs(codecs)
  return [_measure(codec, teacher, student, temperature) for codec in codecs]


def estimate_table(estimates: Sequence[Estimate]) -> str:
  """Returns the estimates in Markdown, a line each; the cosine of the default loss is first.

  >>> from distill_jax import cache
  >>> cosines = {"sparse_kl": 0.98, "sparse_kl_conditional": 0.91, "sparse_kl_smoothed": 0.97}
  >>> estimate = cache.Estimate(cache.TopK(16), 40, (0.95, 0.71), cosines)
  >>> print(cache.estimate_table([estimate]))
  | codec | bytes | mass | 5 % quantile | cosine | conditional | smoothed |
  | --- | --- | --- | --- | --- | --- | --- |
  | TopK(16) | 40 | 0.9500 | 0.7100 | 0.9800 | 0.9100 | 0.9700 |
  """
  lines = [_line(HEADER), _line(["---"] * len(HEADER))]
  return "\n".join([*lines, *map(_line, map(_cells, estimates))])


def _some_tokens(output: LazyLogits) -> jax.Array:
  """Returns the logits of evenly spaced tokens."""
  hidden = output.hidden.reshape(-1, output.hidden.shape[-1])
  stride = -(-len(hidden) // MAX_TOKENS)
  return compute_logits(output._replace(hidden=hidden[::stride]))


def _check_logits(logits: jax.Array) -> None:
  if logits.ndim < 2 or logits.size == 0 or not jnp.issubdtype(logits.dtype, jnp.floating):
    raise ValueError(
      "teacher: expected logits [N, ..., V], floating, N and V at least 1; "
      f"got {logits.dtype} {list(logits.shape)}"
    )
  count = int((output_errors.logit_errors(logits) > 0).sum())
  if count:
    raise ValueError(
      f"teacher: expected finite logits, got {count} of {len(logits)} examples with NaN, +inf or "
      "-inf in all classes"
    )


def _check_codecs(codecs: Any) -> None:
  kinds = "Dense, TopK and RandomSampling"
  if isinstance(codecs, Codec):
    raise ValueError(f"codecs: expected a sequence of {kinds}, got {type(codecs).__name__}")
  if not codecs:
    raise ValueError(f"codecs: expected at least one of {kinds}, got none")
  for codec in codecs:
    if type(codec) not in LOSSES:
      raise ValueError(f"codecs: expected {kinds}, got {codec!r}")


def _measure(codec: Codec, teacher: jax.Array, student: jax.Array, temperature: float) -> Estimate:
  temperature = getattr(codec, "temperature", temperature)

  @jax.jit
  def cosines(teacher: jax.Array, student: jax.Array) -> dict[str, jax.Array]:
    rows = jnp.arange(len(teacher))
    targets = codec.decode(codec.encode(teacher, {"id": rows, "view": 0 * rows}), teacher)
    exact = _gradient(losses.kl_divergence, student, teacher, temperature=temperature)
    options = {"temperature": temperature} if isinstance(codec, Dense) else {}
    return {
      loss.__name__: _cosine(_gradient(loss, student, targets, **options), exact)
      for loss in LOSSES[type(codec)]
    }

  if isinstance(codec, TopK):
    mass = top_k_mass(teacher, codec.k, temperature=temperature)
  else:
    mass = (1.0, 1.0) if isinstance(codec, Dense) else (math.nan, math.nan)
  values = {name: float(value) for name, value in cosines(teacher, student).items()}
  return Estimate(codec, row_bytes(codec, teacher), mass, values)


def _gradient(loss: Callable, student: jax.Array, targets: Any, **options: Any) -> jax.Array:
  mean_loss = lambda logits: loss(logits, targets, **options).mean()  # noqa: E731
  return jax.grad(mean_loss)(student.astype(jnp.float32))


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  return (a * b).sum() / jnp.sqrt((a * a).sum() * (b * b).sum())


def _cells(estimate: Estimate) -> list[str]:
  codec = estimate.codec
  name = f"{type(codec).__name__}({_parameter(codec)})"
  mass = ["-" if math.isnan(value) else f"{value:.4f}" for value in estimate.mass]
  cosines = [f"{value:.4f}" for value in estimate.cosines.values()]
  padding = ["-"] * (3 - len(cosines))
  return [name, f"{estimate.bytes:,}", *mass, *cosines, *padding]


def _parameter(codec: Codec) -> str:
  if isinstance(codec, Codes):
    return f"{codec.num_codes}"
  if not isinstance(codec, Dense):
    return f"{codec.k}"
  return codec.dtype if codec.size is None else f"{codec.dtype}, {' x '.join(map(str, codec.size))}"


def _line(cells: Sequence[str]) -> str:
  return "| " + " | ".join(cells) + " |"
