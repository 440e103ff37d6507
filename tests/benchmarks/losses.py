"""Times each loss, forward and backward, against torchdistill's or a direct translation to PyTorch.

python tests/benchmarks/losses.py [--threads 1] [--pairs N] [NAME ...]

Run it in a separate environment, with the package's checkout on the path and the table's versions:

  python -m venv /tmp/peers
  /tmp/peers/bin/pip install torch==2.13.0 torchdistill==1.1.5 jax==0.10.2   (torch's CPU wheel)
  PYTHONPATH=. /tmp/peers/bin/python tests/benchmarks/losses.py

Both sides take the same float32 arrays, return the mean over the batch and its gradient for the
student, must agree, and are timed by turns in one process: ours under `jax.jit`, PyTorch eagerly,
with channels last and second. Prints a Markdown table; a speed is PyTorch's median time over ours.

On two cores (the default) it uses the wall clock and needs a quiet machine: PyTorch's threads wait
for each other, so that other work slows it down more. --threads 1 uses processor time on one core,
which other work hardly changes.
"""

import argparse
import itertools
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence

sys.path.append(str(pathlib.Path(__file__).parent.parent / "losses"))

import jax
import jax_losses
import numpy as np
import torch
import torch_losses
from peer_cases import CASES, Case, Inputs
from timing import Ratio, Run, compare, seconds

HEADER = (
  "| loss | student | torch side | speed | ours, ms | torch, ms | spread |\n"
  "|---|---|---|---|---|---|---|"
)


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("names", metavar="NAME", nargs="*", help=", ".join(case.id for case in CASES))
  parser.add_argument("--pairs", type=int, default=30, help="samples of both sides")
  parser.add_argument(
    "--threads", type=int, choices=(1, 2), default=2, help="1: processor time on one core"
  )
  options = parser.parse_args(arguments)
  unknown = set(options.names) - {case.id for case in CASES}
  if unknown:
    parser.error(f"names: expected names of losses, got {', '.join(sorted(unknown))}")
  torch.set_num_threads(options.threads)
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.threads :])
  clock = time.process_time if options.threads == 1 else time.perf_counter
  print(HEADER, flush=True)
  ratios = []
  for case in CASES:
    if case.id in options.names or not options.names:
      ratios.append(measure(case, options.pairs, clock))
      print(row(case, ratios[-1]), flush=True)
  mean = statistics.geometric_mean(1 / ratio.value for ratio in ratios)
  print(f"| **geometric mean** | | | **{mean:.2f}** | | | |")


def measure(case: Case, pairs: int, clock) -> Ratio:
  """Returns the seconds of both sides, after a check that they agree."""
  args = case.make(Inputs(real=True))
  check_same(case, args)
  run, other_run = ours(case, args)[0], theirs(case, args)[0]
  seconds(run, 1)
  calls = max(2, round(0.02 / seconds(run, 2)))
  return compare(run, other_run, pairs=pairs, calls=calls, clock=clock, pause=0.02)


def check_same(case: Case, args) -> None:
  """Checks that both sides return one value and one gradient, to rounding.

  Raises:
    AssertionError: they do not.
  """
  value, gradient = ours(case, args)[1]()
  expected, reference = theirs(case, args)[1]()
  np.testing.assert_allclose(value, expected, rtol=1e-3, err_msg=case.id)
  for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max(), rtol=1e-3, err_msg=case.id)


def ours(case: Case, args) -> tuple[Run, Callable]:
  """Returns a function that runs some steps, and one that returns the value and gradient of one."""
  student, *rest = jax.device_put(args)
  f = jax.jit(
    jax.value_and_grad(lambda student, rest: jax_losses.value(case, (student, *rest)), has_aux=True)
  )

  def run(calls):
    return [f(student, rest) for _ in range(calls)][-1]

  def once():
    (value, _), gradient = f(student, rest)
    return value, gradient

  return run, once


def theirs(case: Case, args) -> tuple[Run, Callable]:
  """Returns the same functions of PyTorch."""
  tensors = torch_losses.tensors(case, args)
  leaves = jax.tree.leaves(tensors[0])
  for leaf in leaves:
    leaf.requires_grad_()

  def run(calls):
    for _ in range(calls):
      for leaf in leaves:
        leaf.grad = None
      value = torch_losses.value(case, tensors)
      value.backward()
    return value

  def once():
    value = run(1).item()
    return value, torch_losses.arrays(case, jax.tree.map(lambda leaf: leaf.grad, tensors[0]))

  return run, once


def row(case: Case, ratio: Ratio) -> str:
  """Returns a line of the table."""
  milliseconds, torch_milliseconds = (1000 * seconds for seconds in ratio.medians)
  slow, fast = ratio.middle
  shape = case.make(Inputs(real=True))[0]
  shapes = " ".join(str(list(np.shape(x))) for x in itertools.islice(jax.tree.leaves(shape), 2))
  cells = [case.id, shapes, case.peer, f"{1 / ratio.value:.2f}"]
  cells += [f"{milliseconds:.2f}", f"{torch_milliseconds:.2f}"]
  return f"| {' | '.join(cells)} | {1 / fast:.2f} to {1 / slow:.2f} |"


if __name__ == "__main__":
  main()
