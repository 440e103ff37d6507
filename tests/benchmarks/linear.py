"""Measures memory and time of the losses that never store the logits, next to the losses on logits.

python tests/benchmarks/linear.py
    [--sizes TOKENSxCLASSES ...] [--teacher] [--pairs N] [--most MIB] [--memory MIB]
python tests/benchmarks/linear.py --compile_for=v5e:1x1    # needs libtpu, no TPU

LINEAR.md has the output. The first command prints a Markdown table for T tokens and V classes, H =
512, float32, forward and backward: temporaries of the compiled programs for all, and processor time
over the unfused loss' where that one's temporaries are at most --most (4,096 MiB). By classes with
64 MiB, the default; by tokens with an eighth of the unfused loss' temporaries, or with the memory
of 256 tokens where that is more (--memory sets the MiB). Targets are the top 64 of a cache; with
--teacher, live hidden states and a head of the same shape. Both sides are timed by turns, and must
agree. Processor time is the sum over the cores.

The second compiles T = 8,192, V = 128,256, H = 4,096 in bfloat16 for one chip, the case that Liger
publishes (Hsu et al. 2024): temporaries, and FLOPs of the matrix products over the unfused loss',
counted before compilation, since XLA counts a loop's body once.
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

EMBED_DIM, K, MIB = 512, 64, 2**20
LIGER = (8192, 128_256, 4096)
"""T, V and H."""
FAST = 2**32
"""Bytes by tokens; the kernel's gradient takes half of them."""
SIZES = [(t, v) for t in (1024, 4096, 16_384) for v in (8192, 32_768, 131_072, 262_144)]
HEADER = (
  "| T | V | unfused, MiB | by classes, MiB | time | by tokens, MiB | time |\n"
  "|---|---|---|---|---|---|---|"
)
HEADER_AHEAD = (
  "| loss | unfused, MiB | by classes, MiB | FLOPs | by tokens, MiB | FLOPs |\n"
  "|---|---|---|---|---|---|"
)


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints one of the tables."""
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
    "--teacher", action="store_true", help="a live teacher instead of cached targets"
  )
  parser.add_argument("--pairs", type=int, default=3, help="samples of both sides")
  parser.add_argument("--most", type=int, default=4096, help="MiB of an unfused loss that is timed")
  parser.add_argument("--memory", type=int, help="MiB by tokens")
  options = parser.parse_args(arguments)
  print(HEADER_AHEAD if options.compile_for else HEADER, flush=True)
  if options.compile_for:
    sizes = (512, 1280, 256) if options.quick else LIGER
    for name in CASES:
      print(row_ahead(name, options.compile_for, sizes), flush=True)
    return
  for tokens, classes in [(128, 640)] if options.quick else options.sizes:
    print(row(tokens, classes, options), flush=True)


def size(text: str) -> tuple[int, int]:
  """Parses 'TxV'."""
  tokens, classes = map(int, text.split("x"))
  return tokens, classes


def row(tokens: int, classes: int, options: argparse.Namespace) -> str:
  """Returns a line of the table."""
  problem = live if options.teacher else cached
  shapes = jax.eval_shape(lambda: problem(tokens, classes))
  unfused = step(unfused_live if options.teacher else unfused_cached)
  full = temporaries(unfused, shapes)
  cells = [f"{tokens:,}", f"{classes:,}", f"{full / MIB:,.0f}"]
  arrays = problem(tokens, classes) if full <= options.most * MIB else None
  loss = losses.linear_kl if options.teacher else losses.linear_sparse_kl
  sides = 2 if options.teacher else 1
  least = 4 * (
    losses.linear.plan.MIN_TOKENS * sides * (classes + 4 * losses.linear.plan.PART)
    + 2 * tokens * EMBED_DIM
  )
  by_tokens = options.memory * MIB if options.memory else max(int(full // 8), least)
  for memory in (None, by_tokens):
    fused = step(functools.partial(loss, memory=memory))
    cells.append(f"{temporaries(fused, shapes) / MIB:,.0f}")
    time_cell = (
      "" if arrays is None else format_ratio(measure(fused, unfused, arrays, options.pairs))
    )
    cells.append(time_cell)
  return f"| {' | '.join(cells)} |"


def step(loss: Callable):
  """Returns the jitted value and gradients for the student's hidden states and kernel."""
  return jax.jit(jax.value_and_grad(loss, (0, 1)))


def temporaries(program, shapes) -> int:
  """Returns the bytes of a compiled program's temporaries."""
  return program.lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def measure(fused, unfused, arrays, pairs: int) -> Ratio:
  """Returns the processor seconds of both, after a check that they agree."""
  for a, b in zip(jax.tree.leaves(fused(*arrays)), jax.tree.leaves(unfused(*arrays)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))
  sides = (lambda calls, f=f: [f(*arrays) for _ in range(calls)][-1] for f in (fused, unfused))
  return compare(*sides, pairs=pairs, calls=1, clock=time.process_time)


def row_ahead(name: str, topology: str, sizes: tuple[int, int, int]) -> str:
  """Returns a line of the other table."""
  fused, unfused, arguments = CASES[name]
  shapes = arguments(*sizes)
  sides = (unfused, fused, functools.partial(fused, memory=FAST))
  full, *ours = compile_for_tpu(topology, {"data": 1}, [program(side, shapes) for side in sides])
  cells = [name, format_memory(full)]
  for compiled in ours:
    flops = (compiled.products or 0) / (full.products or 1)
    cells += [format_memory(compiled), f"{flops:.3f}"]
  return f"| {' | '.join(cells)} |"


def program(loss: Callable, shapes) -> Program:
  """Returns the lowered value and gradients for one chip."""
  mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,))
  replicated = PartitionSpec()
  function = jax.value_and_grad(loss, (0, 1))
  return lower(function, shapes, [replicated] * len(shapes), replicated, mesh, "tpu")


def format_memory(compiled: Compiled) -> str:
  """Returns the MiB of temporaries, or of everything if the program does not fit."""
  if compiled.memory is None:
    return f"does not fit: {compiled.needed / MIB:,.0f} in all"
  return f"{compiled.memory.temporaries / MIB:,.0f}"


def format_ratio(ratio: Ratio) -> str:
  """Returns the ratio with its middle half."""
  low, high = ratio.middle
  return f"{ratio.value:.2f} ({low:.2f} to {high:.2f})"


def cached(tokens: int, classes: int):
  """Returns hidden states, a kernel, and the top classes of random logits."""
  hidden, kernel = head(tokens, classes, 0)
  keys = jax.random.split(jax.random.key(1), 2)
  stride = classes // K
  indices = jnp.arange(K) * stride + jax.random.randint(keys[0], (tokens, K), 0, stride)
  z = jnp.concatenate([jax.random.normal(keys[1], (tokens, K)), jnp.zeros((tokens, 1))], -1)
  log_p = jax.nn.log_softmax(2 * z)
  return hidden, kernel, losses.SparseTargets(indices, log_p[:, :-1], log_p[:, -1])


def live(tokens: int, classes: int):
  """Returns hidden states and a kernel of both sides."""
  return *head(tokens, classes, 0), *head(tokens, classes, 1)


def head(tokens: int, classes: int, seed: int):
  """Returns random hidden states and a kernel."""
  keys = jax.random.split(jax.random.key(seed), 2)
  hidden = jax.random.normal(keys[0], (tokens, EMBED_DIM))
  return hidden, jax.random.normal(keys[1], (EMBED_DIM, classes)) * EMBED_DIM**-0.5


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


def narrow(tokens: int, classes: int, embed_dim: int):
  """Returns shapes of hidden states and a kernel in bfloat16."""
  hidden = shaped(tokens, embed_dim, dtype=jnp.bfloat16)
  return hidden, shaped(embed_dim, classes, dtype=jnp.bfloat16)


def shaped(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def top_k_shapes(tokens: int):
  return losses.SparseTargets(shaped(tokens, K, dtype=jnp.int32), shaped(tokens, K), shaped(tokens))


CASES = {
  "labels": (
    losses.linear_cross_entropy,
    unfused_labels,
    lambda t, v, h: (*narrow(t, v, h), shaped(t, dtype=jnp.int32)),
  ),
  "top 64": (
    losses.linear_sparse_kl,
    unfused_narrow,
    lambda t, v, h: (*narrow(t, v, h), top_k_shapes(t)),
  ),
  "live teacher": (
    losses.linear_kl,
    unfused_narrow_live,
    lambda t, v, h: (*narrow(t, v, h), *narrow(t, v, h)),
  ),
}


if __name__ == "__main__":
  main()
