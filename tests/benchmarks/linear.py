"""Memory and time of the losses that never hold the logits, beside the losses on logits. LINEAR.md: what it printed.

python tests/benchmarks/linear.py [--sizes TOKENSxCLASSES ...] [--teacher] [--pairs N] [--most MIB] [--memory MIB]
python tests/benchmarks/linear.py --compile_for=v5e:1x1    # needs libtpu, no TPU

The first prints a Markdown table for T tokens and V classes, H = 512, float32, forward and backward: temporaries of the
compiled programs for all, and processor time over the unfused loss' where that one's temporaries are at most --most
(4,096 MiB). By classes with 64 MiB, the default; by tokens with an eighth of the unfused loss' temporaries, or with
what 256 tokens need where that is more (--memory: with so many MiB). Targets are the top 64 of a cache; --teacher:
live hidden states and a head of the same shape. Both sides are timed by turns, and must agree. Processor time counts
the cores' work.

The second compiles T = 8,192, V = 128,256, H = 4,096 in bfloat16 for one chip, the case that Liger publishes (Hsu et
al. 2024): temporaries, and FLOPs of the matrix products over the unfused loss', counted before compilation, since XLA
counts a loop's body once.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from timing import Ratio, compare

from distill_jax import losses
from distill_jax.cost.child import compile_for_tpu
from distill_jax.cost.compiling import Compiled, Program, lower

WIDTH, KEPT, MIB = 512, 64, 2**20
LIGER, FAST = (
  (8192, 128_256, 4096),
  2**32,
)  # T, V, H; bytes, by tokens: the kernel's gradient alone takes half of them
SIZES = [(t, v) for t in (1024, 4096, 16_384) for v in (8192, 32_768, 131_072, 262_144)]
HEADER = "| T | V | unfused, MiB | by classes, MiB | time | by tokens, MiB | time |\n|---|---|---|---|---|---|---|"
AHEAD = "| loss | unfused, MiB | by classes, MiB | FLOPs | by tokens, MiB | FLOPs |\n|---|---|---|---|---|---|"


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--quick", action="store_true", help="one tiny size, whose times mean nothing"
  )
  parser.add_argument(
    "--sizes", nargs="+", type=size, default=SIZES, metavar="TxV", help="such as 4096x131072"
  )
  parser.add_argument(
    "--compile_for", metavar="TOPOLOGY", help="compile Liger's case for a TPU, such as v5e:1x1"
  )
  parser.add_argument(
    "--teacher", action="store_true", help="a live teacher in place of cached targets"
  )
  parser.add_argument("--pairs", type=int, default=3, help="samples of both sides")
  parser.add_argument("--most", type=int, default=4096, help="MiB of an unfused loss that is timed")
  parser.add_argument("--memory", type=int, help="MiB by tokens")
  given = parser.parse_args(arguments)
  print(AHEAD if given.compile_for else HEADER, flush=True)
  if given.compile_for:
    for name in CASES:
      print(
        row_ahead(name, given.compile_for, (512, 1280, 256) if given.quick else LIGER), flush=True
      )
    return
  for tokens, classes in [(128, 640)] if given.quick else given.sizes:
    print(row(tokens, classes, given), flush=True)


def size(text: str) -> tuple[int, int]:
  tokens, classes = map(int, text.split("x"))
  return tokens, classes


def row(tokens: int, classes: int, given: argparse.Namespace) -> str:
  """A line of the table."""
  problem = live if given.teacher else cached
  shapes = jax.eval_shape(lambda: problem(tokens, classes))
  unfused = step(unfused_live if given.teacher else unfused_cached)
  full = temporaries(unfused, shapes)
  cells = [f"{tokens:,}", f"{classes:,}", f"{full / MIB:,.0f}"]
  arrays = problem(tokens, classes) if full <= given.most * MIB else None
  own = losses.linear_kl if given.teacher else losses.linear_sparse_kl
  sides = 2 if given.teacher else 1
  least = 4 * (
    losses.linear.plan.MIN_TOKENS * sides * (classes + 4 * losses.linear.plan.PART)
    + 2 * tokens * WIDTH
  )
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


def row_ahead(name: str, topology: str, sizes: tuple[int, int, int]) -> str:
  """A line of the other table."""
  fused, unfused, arguments = CASES[name]
  shapes = arguments(*sizes)
  sides = (unfused, fused, functools.partial(fused, memory=FAST))
  full, *ours = compile_for_tpu(topology, {"data": 1}, [program(side, shapes) for side in sides])
  cells = [name, taken(full)]
  for one in ours:
    cells += [taken(one), f"{(one.products or 0) / (full.products or 1):.3f}"]
  return f"| {' | '.join(cells)} |"


def program(loss: Callable, shapes) -> Program:
  mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,))
  nowhere = PartitionSpec()
  function = jax.value_and_grad(loss, (0, 1))
  return lower(function, shapes, [nowhere] * len(shapes), nowhere, mesh, "tpu")


def taken(compiled: Compiled) -> str:
  """MiB of temporaries, or of all where the program does not fit."""
  if compiled.memory is None:
    return f"does not fit: {compiled.needed / MIB:,.0f} in all"
  return f"{compiled.memory.temporaries / MIB:,.0f}"


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
  return losses.kl_divergence(
    student, jnp.matmul(teacher_hidden, teacher_kernel, precision="highest")
  ).mean()


def unfused_labels(hidden, kernel, labels):
  z = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
  return -jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], -1).mean()


def unfused_narrow(hidden, kernel, targets):
  z = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
  return losses.sparse_kl(z, targets).mean()


def unfused_narrow_live(hidden, kernel, *teacher):
  z, t = (
    jnp.matmul(h, w, preferred_element_type=jnp.float32) for h, w in ((hidden, kernel), teacher)
  )
  return losses.kl_divergence(z, t).mean()


def narrow(tokens: int, classes: int, width: int):
  """Shapes of hidden states and a kernel in bfloat16."""
  return shaped(tokens, width, dtype=jnp.bfloat16), shaped(width, classes, dtype=jnp.bfloat16)


def shaped(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def kept(tokens: int):
  return losses.SparseTargets(
    shaped(tokens, KEPT, dtype=jnp.int32), shaped(tokens, KEPT), shaped(tokens)
  )


CASES = {
  "labels": (
    losses.linear_cross_entropy,
    unfused_labels,
    lambda t, v, h: (*narrow(t, v, h), shaped(t, dtype=jnp.int32)),
  ),
  "top 64": (losses.linear_sparse_kl, unfused_narrow, lambda t, v, h: (*narrow(t, v, h), kept(t))),
  "live teacher": (
    losses.linear_kl,
    unfused_narrow_live,
    lambda t, v, h: (*narrow(t, v, h), *narrow(t, v, h)),
  ),
}


if __name__ == "__main__":
  main()
