"""What each codec costs and loses, measured on a sample of a teacher's logits before anything is written."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses
from distill_jax.cache.codecs import faults
from distill_jax.cache.codecs.dense import Codec, Dense, RandomSampling, TopK
from distill_jax.cache.teacher import headed
from distill_jax.cache.teacher.headed import LazyLogits

TOKENS = 512  # that are taken of many

LOSSES: dict[type, list[Callable[..., jax.Array]]] = {  # the default first
  Dense: [losses.kl_divergence],
  TopK: [losses.sparse_kl, losses.sparse_kl_conditional, losses.sparse_kl_smoothed],
  RandomSampling: [losses.sampled_cross_entropy],
}
COLUMNS = "codec", "bytes", "mass kept", "of 5 % less than", "cosine", "conditional", "smoothed"


class Estimate(NamedTuple):
  """One codec on the sample.

  Attributes:
    codec: what was measured.
    bytes: per example (and view), without the ids and checksums of the cache.
    mass: mean, and 5th percentile, of the probability that the kept classes have at the codec's temperature; NaN
      for draws, 1 for a dense codec.
    cosines: by loss, between its gradient (of the decoded targets) and the full KL's, of the sample's mean with respect
      to the student's logits. Draws point elsewhere at random, and their mean over many steps does not: compare top k
      with top k.
  """

  codec: Codec
  bytes: int
  mass: tuple[float, float]
  cosines: dict[str, float]


def choices(classes: int, *, temperature: float = 1.0) -> list[Codec]:
  """Codecs worth a look for a teacher of so many classes."""
  top = [TopK(k, temperature) for k in (1, 4, 16, 64) if k <= classes]
  return [
    Dense("float16"),
    Dense("int8"),
    *top,
    *(RandomSampling(k, temperature) for k in (12, 50)),
  ]


def row_bytes(codec: Codec, output) -> int:
  """Bytes per example of an output [B, ...]; a `ShapeDtypeStruct` will do."""
  return sum(dtype.itemsize * math.prod(shape) for dtype, shape in codec.columns(output).values())


def kept_mass(logits, k: int, *, temperature: float = 1.0) -> tuple[float, float]:
  """Mean and 5th percentile, over rows, of the probability of the k most probable classes of logits [..., V]."""
  mass = np.asarray(
    -jnp.expm1(losses.top_k(logits, k, temperature=temperature).log_tail), np.float64
  )
  return float(mass.mean()), float(np.percentile(mass, 5))


def estimate(
  teacher, student=None, *, temperature: float = 1.0, codecs: Sequence[Codec] | None = None
) -> list[Estimate]:
  """Measures codecs on a sample.

  Args:
    teacher: logits [N, ..., V] of some hundred examples; of what is `LazyLogits`, some of the tokens are taken.
    student: logits of the same shape, at which the gradients are taken; None: 0, a student that knows nothing.
    temperature: of the loss, and of `choices`; codecs with their own are compared with the full KL at that.
    codecs: to measure; None: `choices`.

  Raises:
    ValueError: the logits are none or not finite, the shapes differ, or a codec cannot keep such logits.
  """
  teacher = _some(teacher) if isinstance(teacher, LazyLogits) else jnp.asarray(teacher)
  _check_logits(teacher)
  student = jnp.zeros_like(teacher) if student is None else jnp.asarray(student)
  if not (math.isfinite(temperature) and temperature > 0):
    raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")
  codecs = choices(teacher.shape[-1], temperature=temperature) if codecs is None else codecs
  _check_codecs(codecs)
  return [_measure(codec, teacher, student, temperature) for codec in codecs]


def table(estimates: Sequence[Estimate]) -> str:
  """The estimates in Markdown, a line each; the cosine of the default loss of a codec comes first."""
  return "\n".join(
    [_line(COLUMNS), _line(["---"] * len(COLUMNS)), *map(_line, map(_cells, estimates))]
  )


def _some(output: LazyLogits) -> jax.Array:
  """Logits of tokens that lie evenly."""
  hidden = output.hidden.reshape(-1, output.hidden.shape[-1])
  return headed.logits(output._replace(hidden=hidden[:: -(-len(hidden) // TOKENS)]))


def _check_logits(logits) -> None:
  if logits.ndim < 2 or logits.size == 0 or not jnp.issubdtype(logits.dtype, jnp.floating):
    raise ValueError(
      f"teacher: expected logits [N, ..., V], floating, N and V at least 1; got {logits.dtype} {list(logits.shape)}"
    )
  wrong = int((faults.of_logits(logits) > 0).sum())
  if wrong:
    raise ValueError(
      f"teacher: {wrong} of the {len(logits)} examples hold NaN or +inf, or are -inf in all classes"
    )


def _check_codecs(codecs) -> None:
  if isinstance(codecs, Codec):
    raise ValueError(
      f"codecs: expected a sequence of Dense, TopK and RandomSampling, got {type(codecs).__name__} alone"
    )
  if not codecs:
    raise ValueError("codecs: expected at least one of Dense, TopK and RandomSampling, got none")
  for codec in codecs:
    if not isinstance(codec, Codec):
      raise ValueError(f"codecs: expected Dense, TopK or RandomSampling, got {codec!r}")


def _measure(codec: Codec, teacher, student, temperature) -> Estimate:
  temperature = getattr(codec, "temperature", temperature)

  @jax.jit
  def cosines(teacher, student):
    rows = jnp.arange(len(teacher))
    kept = codec.decode(codec.encode(teacher, {"id": rows, "view": 0 * rows}), teacher)
    full = _gradient(losses.kl_divergence, student, teacher, temperature=temperature)
    more = {"temperature": temperature} if isinstance(codec, Dense) else {}
    own = {loss.__name__: _gradient(loss, student, kept, **more) for loss in LOSSES[type(codec)]}
    return {name: _cosine(gradient, full) for name, gradient in own.items()}

  if isinstance(codec, TopK):
    mass = kept_mass(teacher, codec.k, temperature=temperature)
  else:
    mass = (1.0, 1.0) if isinstance(codec, Dense) else (math.nan, math.nan)
  found = {name: float(value) for name, value in cosines(teacher, student).items()}
  return Estimate(codec, row_bytes(codec, teacher), mass, found)


def _gradient(loss, student, targets, **hyperparameters):
  return jax.grad(lambda s: loss(s, targets, **hyperparameters).mean())(student.astype(jnp.float32))


def _cosine(a, b):
  return (a * b).sum() / jnp.sqrt((a * a).sum() * (b * b).sum())


def _cells(estimate: Estimate) -> list[str]:
  codec = estimate.codec
  name = f"{type(codec).__name__}({codec.dtype if isinstance(codec, Dense) else codec.k})"
  kept = ["-" if math.isnan(mass) else f"{mass:.4f}" for mass in estimate.mass]
  cosines = [f"{value:.4f}" for value in estimate.cosines.values()]
  return [name, f"{estimate.bytes:,}", *kept, *cosines, *["-"] * (3 - len(cosines))]


def _line(cells: Sequence[str]) -> str:
  return "| " + " | ".join(cells) + " |"
