"""Measures how far the gradient of a stored teacher's loss is from the full one.

python tests/benchmarks/sparse_bias.py [--quick]

Top k is biased, random samples are not. The teacher has 32,000 classes whose probabilities fall as
a power of the rank, and the student is half way to it. Prints a Markdown table of |mean of the
gradient - full gradient| / |full gradient| over the number of times that the teacher was stored:
only random samples differ from one time to the next, and their error falls with the square root.
"""

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses
from distill_jax.cache import RandomSampling, TopK
from distill_jax.cache.codecs.estimates import row_bytes

CHUNK = 64
TOP_K = [losses.sparse_kl, losses.sparse_kl_conditional, losses.sparse_kl_smoothed]


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--quick", action="store_true", help="500 classes and few samples")
  quick = parser.parse_args(arguments).quick
  teacher, student = problem(500 if quick else 32_000)
  times = [64, 256] if quick else [64, 256, 1024, 4096]
  head = [f"{n:,} times" for n in times]
  print("| codec | bytes | loss |", " | ".join(head), "|")
  print("|---" * (3 + len(times)) + "|")
  codecs = (
    [TopK(16), RandomSampling(50)]
    if quick
    else [TopK(16), TopK(64), TopK(256), RandomSampling(12), RandomSampling(50)]
  )
  for codec in codecs:
    for loss in TOP_K if isinstance(codec, TopK) else [losses.sampled_cross_entropy]:
      relative_errors = errors(codec, loss, teacher, student, times)
      cells = [
        f"{type(codec).__name__}({codec.k})",
        str(row_bytes(codec, teacher[None])),
        loss.__name__,
        *(f"{e:.4f}" for e in relative_errors),
      ]
      print("|", " | ".join(cells), "|", flush=True)


def problem(classes: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
  """Returns logits [classes] of a teacher and of a student."""
  rng = np.random.default_rng(seed)
  teacher = rng.normal(size=classes) - 1.1 * np.log(1 + rng.permutation(classes))
  student = 0.5 * teacher + 0.5 * rng.normal(size=classes)
  return jnp.asarray(teacher, jnp.float32), jnp.asarray(student, jnp.float32)


def errors(codec, loss, teacher, student, times: Sequence[int]) -> list[float]:
  """Returns relative errors of the mean gradient over so many stored outputs, multiples of 64."""
  full = jax.grad(losses.kl_divergence)(student, teacher)

  @jax.jit
  def add(total, start):
    batch = {"id": start + jnp.arange(CHUNK), "view": jnp.zeros(CHUNK, jnp.int32)}
    rows = jnp.broadcast_to(teacher, (CHUNK, *teacher.shape))
    targets = codec.decode(codec.encode(rows, batch), rows)
    return total + jax.vmap(jax.grad(loss), (None, 0))(student, targets).sum(0)

  results = []
  total = jnp.zeros_like(student)
  # Top k is the same every time.
  once = isinstance(codec, TopK)
  for start in range(0, CHUNK if once else max(times), CHUNK):
    total = add(total, start)
    if start + CHUNK in times or once:
      error = jnp.linalg.norm(total / (start + CHUNK) - full) / jnp.linalg.norm(full)
      results.append(float(error))
  return results * len(times) if once else results


if __name__ == "__main__":
  main()
