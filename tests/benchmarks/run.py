"""Times the library: ratios of medians, both sides by turns in one process, on one device.

python tests/benchmarks/run.py [--quick] [NAME ...]

Prints a Markdown table. The spread is the middle half of the ratios sample by sample: it is wide on
a busy machine.
"""

import argparse
import functools
from collections.abc import Sequence

import cache_bytes
import cached
import cases
import ctc
import detectors
import encoders
import host_filling
import problems
import seq2seq
import windows
from timing import Ratio

RUNS = {  # name: (case, problem, samples, goal)
  "step-cnn": (cases.library_to_hand, problems.cnn, 60, 1.03),
  "step-mlp": (cases.library_to_hand, problems.mlp, 200, 1.10),
  "one-jit-cnn": (cases.one_jit_to_two, problems.cnn, 60, 1.00),
  "one-jit-mlp": (cases.one_jit_to_two, problems.mlp, 200, 1.00),
  "fit-cnn": (cases.fit_to_step, problems.cnn, 20, 1.10),
  "fit-mlp": (cases.fit_to_step, problems.mlp, 100, 1.10),
  "cached-cnn": (cases.cached_to_supervised, problems.cnn, 60, 1.03),
  "cached-mlp": (cases.cached_to_supervised, problems.mlp, 200, 1.20),
  "cache-cnn": (cached.dense_to_baseline, problems.cnn, 20, 1.05),
  "cache-mlp": (cached.dense_to_baseline, problems.mlp, 100, 1.20),
  "cache-top64": (cached.top_k_to_baseline, problems.mlp, 20, 1.05),
  "cache-maps": (cached.maps_to_baseline, problems.unet, 10, 1.05),
  "cache-maps-4": (functools.partial(cached.maps_to_baseline, shrink=4), problems.unet, 10, 1.05),
  "map-counts": (cases.counts_to_forward, problems.unet, 60, 1.02),
  "step-detector": (detectors.step_to_parts, detectors.yolo, 30, 1.05),
  "box-scores": (detectors.scores_to_forward, detectors.yolo, 10, 1.00),
  "step-encoder": (encoders.live_to_parts, bool, 10, 1.03),
  "cached-encoder": (encoders.cached_to_own, bool, 10, 1.03),
  "step-seq2seq": (seq2seq.live_to_parts, bool, 10, 1.03),
  "cached-seq2seq": (seq2seq.cached_to_supervised, bool, 10, 1.05),
  "step-ctc": (ctc.live_to_parts, bool, 10, 1.03),
  "read-classes": (cache_bytes.read, cache_bytes.classes, 20, 1.50),
  "read-tokens": (cache_bytes.read, cache_bytes.tokens, 20, 1.50),
  "write": (cache_bytes.write, cache_bytes.classes, 20, 1.20),
  "fill-host": (host_filling.fill_to_calls, host_filling.imagenet, 6, 1.05),
  "windows": (windows.windows_to_whole, windows.slices, 20, 1.05),
}
HEADER = "| benchmark | ratio | goal | ours, ms | theirs, ms | spread |\n|---|---|---|---|---|---|"


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("names", metavar="NAME", nargs="*", help=", ".join(RUNS))
  parser.add_argument(
    "--quick", action="store_true", help="tiny sizes, 3 samples: the times mean nothing"
  )
  options = parser.parse_args(arguments)
  unknown = set(options.names) - set(RUNS)
  if unknown:
    parser.error(f"names: expected some of {', '.join(RUNS)}, got {', '.join(sorted(unknown))}")
  print(HEADER, flush=True)
  for name in options.names or RUNS:
    print(row(name, measure(name, quick=options.quick)), flush=True)


def measure(name: str, *, quick: bool = False) -> Ratio:
  """Returns the ratio of the benchmark of this name."""
  case, problem, samples, _ = RUNS[name]
  return case(problem(quick), 3 if quick else samples)


def row(name: str, ratio: Ratio) -> str:
  """Returns a line of the table."""
  ours, theirs = (1000 * seconds for seconds in ratio.medians)
  low, high = ratio.middle
  goal = RUNS[name][-1]
  numbers = f"{ratio.value:.3f} | {goal:.2f} | {ours:.3f} | {theirs:.3f}"
  return f"| {name} | {numbers} | {low:.3f} to {high:.3f} |"


if __name__ == "__main__":
  main()
