"""Times the seal of a checkpoint.

python tests/benchmarks/seal_cost.py [GIGABYTES]

The goal: for a state of 1 GB at most 0.6 s, 1 % of the time between two checkpoints that are 60 s
apart. Training waits for the seal, but not for the writing. On a busy machine, use the processor's
seconds, which are the time of the seal on one core. A sum of the same bytes shows the cost of
reading them.
"""

import sys
import time

import jax
import jax.numpy as jnp

from distill_jax.storage import seal
from distill_jax.types import Skips, TrainState


def make_state(gigabytes: float) -> TrainState:
  """Returns parameters and Adam's two moments, a third of the bytes each, in arrays of 8 MB."""
  count = max(1, round(gigabytes * 1e9 / 3 / 8e6))
  sample = jax.jit(lambda number: jax.random.normal(jax.random.key(number), (1000, 2000)))
  params, *moments = (
    {f"layer{n}": sample(n + 1000 * part) for n in range(count)} for part in range(3)
  )
  zero = jnp.zeros((), jnp.int32)
  return TrainState(
    zero,
    jax.random.key(0),
    {"student": params, "objective": {}},
    {},
    moments,
    (),
    Skips(zero, zero, zero),
  )


@jax.jit
def plain_sums(tree):
  """Returns the sum of each leaf's bits."""
  return jax.tree.map(
    lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32).sum(dtype=jnp.uint32), tree
  )


def seconds(run, times: int = 9) -> tuple[float, float]:
  """Returns the least wall and processor seconds of several runs, after one that compiles."""
  jax.block_until_ready(run())
  samples = []
  for _ in range(times):
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    samples.append((time.perf_counter() - wall, time.process_time() - processor))
  walls, processors = zip(*samples)
  return min(walls), min(processors)


def main() -> None:
  """Prints the times."""
  state = jax.block_until_ready(make_state(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0))
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  leaves, kind = len(jax.tree.leaves(state)), jax.devices()[0].device_kind
  print(f"{size / 1e9:.2f} GB in {leaves} leaves, {jax.device_count()} x {kind}")
  print(f"{'':12s}{'clock':>9s}{'processor':>11s}")
  for name, run in {
    "seal": lambda: seal.make_seal(state, {"accuracy": 0.5}, {"seed": 0}),
    "plain sum": lambda: plain_sums((state.params, state.opt_state)),
  }.items():
    clock, processor = seconds(run)
    print(f"{name:12s}{clock:7.2f} s{processor:9.2f} s   {clock / 60:.2%} of 60 s")


if __name__ == "__main__":
  main()
