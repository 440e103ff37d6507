"""Memory and time of the losses that never hold the logits, beside the losses on logits.

python tests/benchmarks/linear.py [--quick] [--teacher] [--pairs N] [--most MIB] [--memory MIB]

Prints a Markdown table for T tokens and V classes, H = 512, float32, forward and backward: temporaries of the compiled
programs for all, and processor time over the unfused loss' where that one's temporaries are at most --most (4,096 MiB).
By classes with 64 MiB, the default; by tokens with an eighth of the unfused loss' temporaries, or with what 256 tokens
need where that is more (--memory: with so many MiB).

Targets are the top 64 of a cache; --teacher: live hidden states and a head of the same shape. Both sides are timed by
turns, and must agree. Processor time counts the cores' work. What it printed on two cores that other programs used too,
with jax 0.10.2; times by classes with --most 1200, at T 4,096 and V 131,072 of 3 pairs alone:

| T | V | unfused, MiB | by classes, MiB | time | by tokens, MiB |
|---|---|---|---|---|---|
| 1,024 | 8,192 | 65 | 51 | 0.95 | 27 |
| 1,024 | 32,768 | 257 | 81 | 1.08 | 99 |
| 1,024 | 131,072 | 1,025 | 81 | 1.01 | 387 |
| 1,024 | 262,144 | 2,049 | 81 | | 771 |
| 4,096 | 8,192 | 289 | 74 | 0.85 | 54 |
| 4,096 | 32,768 | 1,153 | 72 | 1.02 | 158 |
| 4,096 | 131,072 | 4,609 | 72 | 0.97 | 578 |
| 4,096 | 262,144 | 9,217 | 72 | | 1,138 |
| 16,384 | 8,192 | 1,156 | 96 | 0.76 | 218 |
| 16,384 | 32,768 | 4,612 | 85 | | 637 |
| 16,384 | 131,072 | 18,436 | 85 | | 2,313 |
| 16,384 | 262,144 | 36,868 | 85 | | 4,548 |
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from timing import Ratio, compare

from distill_jax import losses

WIDTH, KEPT, MIB = 512, 64, 2**20
SIZES = [(t, v) for t in (1024, 4096, 16_384) for v in (8192, 32_768, 131_072, 262_144)]
HEADER = (
  "| T | V | unfused, MiB | by classes, MiB | time | by tokens, MiB | time |\n|---|---|---|---|---|---|---|"
)


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--quick", action="store_true", help="one tiny size, whose times mean nothing")
  parser.add_argument("--teacher", action="store_true", help="a live teacher in place of cached targets")
  parser.add_argument("--pairs", type=int, default=3, help="samples of both sides")
  parser.add_argument("--most", type=int, default=4096, help="MiB of an unfused loss that is timed")
  parser.add_argument("--memory", type=int, help="MiB by tokens")
  given = parser.parse_args(arguments)
  print(HEADER, flush=True)
  for tokens, classes in [(128, 640)] if given.quick else SIZES:
    print(row(tokens, classes, given), flush=True)


def row(tokens: int, classes: int, given: argparse.Namespace) -> str:
  """A line of the table."""
  problem = live if given.teacher else cached
  shapes = jax.eval_shape(lambda: problem(tokens, classes))
  unfused = step(unfused_live if given.teacher else unfused_cached)
  full = temporaries(unfused, shapes)
  cells = [f"{tokens:,}", f"{classes:,}", f"{full / MIB:,.0f}"]
  arrays = problem(tokens, classes) if full <= given.most * MIB else None
  own = losses.linear_kl if given.teacher else losses.linear_sparse_kl
  least = 4 * classes * losses.linear.LEAST_TOKENS * (6 if given.teacher else 3)
  share = given.memory * MIB if given.memory else max(int(full // 8), least)
  for memory in (None, share):
    fused = step(functools.partial(own, memory=memory))
    cells.append(f"{temporaries(fused, shapes) / MIB:,.0f}")
    cells.append("" if arrays is None else shown(measure(fused, unfused, arrays, given.pairs)))
  return f"| {' | '.join(cells)} |"


def step(loss: Callable):
  """Compiles to the value and the gradients for the student's hidden states and kernel."""
  return jax.jit(jax.value_and_grad(loss, (0, 1)))


def temporaries(program, shapes) -> int:
  return program.lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def measure(fused, unfused, arrays, pairs: int) -> Ratio:
  """Processor seconds of both, once they agree."""
  for a, b in zip(jax.tree.leaves(fused(*arrays)), jax.tree.leaves(unfused(*arrays)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))
  sides = (lambda calls, f=f: [f(*arrays) for _ in range(calls)][-1] for f in (fused, unfused))
  return compare(*sides, pairs=pairs, calls=1, clock=time.process_time)


def shown(ratio: Ratio) -> str:
  low, high = ratio.middle
  return f"{ratio.value:.2f} ({low:.2f} to {high:.2f})"


def cached(tokens: int, classes: int):
  """Hidden states, a kernel, and the top classes of random logits, spread over the vocabulary."""
  hidden, kernel = head(tokens, classes, 0)
  keys = jax.random.split(jax.random.key(1), 2)
  stride = classes // KEPT
  indices = jnp.arange(KEPT) * stride + jax.random.randint(keys[0], (tokens, KEPT), 0, stride)
  z = jnp.concatenate([jax.random.normal(keys[1], (tokens, KEPT)), jnp.zeros((tokens, 1))], -1)
  log_p = jax.nn.log_softmax(2 * z)
  return hidden, kernel, losses.SparseTargets(indices, log_p[:, :-1], log_p[:, -1])


def live(tokens: int, classes: int):
  """Hidden states and a kernel of both sides."""
  return *head(tokens, classes, 0), *head(tokens, classes, 1)


def head(tokens: int, classes: int, seed: int):
  keys = jax.random.split(jax.random.key(seed), 2)
  return jax.random.normal(keys[0], (tokens, WIDTH)), jax.random.normal(
    keys[1], (WIDTH, classes)
  ) * WIDTH**-0.5


def unfused_cached(hidden, kernel, targets):
  return losses.sparse_kl(jnp.matmul(hidden, kernel, precision="highest"), targets).mean()


def unfused_live(hidden, kernel, teacher_hidden, teacher_kernel):
  student = jnp.matmul(hidden, kernel, precision="highest")
  return losses.kl_divergence(student, jnp.matmul(teacher_hidden, teacher_kernel, precision="highest")).mean()


if __name__ == "__main__":
  main()
