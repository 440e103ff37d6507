"""Times a student whose channels are halved by pruning: its throughput over the dense one's.

python tests/benchmarks/shrink.py [--quick] [--pairs N]

Prints a Markdown table for networks of these widths on 28x28 images, evaluation, float32. The
shrunk network's outputs equal the masked one's to 1e-5, and both are timed by turns. Ratios are of
medians, by this process' processor time, which other work on the machine changes less, and by wall
clock. Output of --pairs 25 on two quiet cores, with jax 0.10.2:

| network | batch | processor time | wall | dense, examples/s | shrunk |
|---|---|---|---|---|---|
| CNN 16, 32, 64 | 1 | 1.08 | 1.11 | 9,939 | 11,020 |
| CNN 16, 32, 64 | 128 | 1.22 | 1.20 | 35,999 | 43,303 |
| CNN 32, 64, 128 | 1 | 1.32 | 1.38 | 6,984 | 9,659 |
| CNN 32, 64, 128 | 128 | 1.67 | 1.67 | 21,034 | 35,024 |
| CNN 64, 128, 256 | 1 | 3.22 | 2.57 | 2,764 | 7,100 |
| CNN 64, 128, 256 | 128 | 3.66 | 3.61 | 5,984 | 21,587 |
| VGG-11, a quarter | 1 | 2.17 | 1.75 | 4,045 | 7,085 |
| VGG-11, a quarter | 128 | 1.94 | 1.96 | 17,047 | 33,341 |

A shrunk network of 8, 16, 32 channels has about a fourth of the multiplications and is hardly
faster: pooling, norms and calls dominate. From 32, 64, 128 channels on the goal of 1.4 is reached
at batch 128, and at batch 1 from twice as many on.
"""

import argparse
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import compare

from distill_jax.compression.pruning.channels import prune_channels
from distill_jax.compression.pruning.groups import groups_of
from distill_jax.compression.pruning.masks import PolynomialSchedule
from distill_jax.compression.pruning.shrink import shrink
from distill_jax.models import from_nnx
from distill_jax.models.zoo.cnn import CNN
from distill_jax.models.zoo.vgg import VGG
from distill_jax.types import Model, Variables

NETWORKS = {
  "CNN 16, 32, 64": lambda rngs: CNN(1, (16, 32, 64), 10, rngs=rngs),
  "CNN 32, 64, 128": lambda rngs: CNN(1, (32, 64, 128), 10, rngs=rngs),
  "CNN 64, 128, 256": lambda rngs: CNN(1, (64, 128, 256), 10, rngs=rngs),
  "VGG-11, a quarter": lambda rngs: VGG(1, 11, 10, width=0.25, rngs=rngs),
}
HEADER = (
  "| network | batch | processor time | wall | dense, examples/s | shrunk |\n"
  "|---|---|---|---|---|---|"
)


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--quick", action="store_true", help="one small network, whose times mean nothing"
  )
  parser.add_argument("--pairs", type=int, default=15, help="samples of both sides")
  options = parser.parse_args(arguments)
  print(HEADER, flush=True)
  for name, make in [*NETWORKS.items()][: 1 if options.quick else None]:
    for rows in (1, 4) if options.quick else (1, 128):
      print(row(name, from_nnx(make), rows, 2 if options.quick else options.pairs), flush=True)


def row(name: str, model: Model, rows: int, pairs: int) -> str:
  """Returns a line of the table."""
  dense, small = networks(model)
  images = jnp.asarray(np.random.default_rng(0).normal(size=(rows, 28, 28, 1)), jnp.float32)
  predict = jax.jit(lambda v, x: model.apply(*v, {"image": x}, train=False, key=None)[0]["logits"])
  np.testing.assert_allclose(predict(small, images), predict(dense, images), rtol=1e-5, atol=1e-5)

  def run(variables):
    def steps(calls):
      for _ in range(calls):
        jax.block_until_ready(predict(variables, images))

    return steps

  calls = max(1, 256 // rows)
  ratios = {
    clock: compare(run(dense), run(small), pairs=pairs, calls=calls, clock=clock)
    for clock in (time.process_time, time.perf_counter)
  }
  speeds = [f"{rows / seconds:,.0f}" for seconds in ratios[time.perf_counter].medians]
  cells = [name, str(rows), *(f"{ratio.value:.2f}" for ratio in ratios.values()), *speeds]
  return f"| {' | '.join(cells)} |"


def networks(model: Model) -> tuple[Variables, Variables]:
  """Returns the network with zeros for half of its channels, and the network without them."""
  variables = jax.jit(model.init)(jax.random.key(0), {})
  groups = groups_of(variables.params)
  step = prune_channels(optax.sgd(0.0), groups, PolynomialSchedule(0, 0), sparsity=0.5)

  @jax.jit
  def masked(params):
    updates, _ = step.update(params, step.init(params), params)
    return optax.apply_updates(params, updates)

  dense = Variables(masked(variables.params), variables.state)
  return dense, shrink(dense, groups)


if __name__ == "__main__":
  main()
