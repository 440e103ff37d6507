"""Runs all of each sweep: `python tests/sweeps/run.py [NAME ...]` prints a table."""

import sys
import tempfile
import time

import checkpoints
import disturbed

SWEEPS = {
  "kills": (
    "100 kills of training on one process",
    lambda folder: disturbed.sweep_kills(folder, 100, 1),
  ),
  "sigterms": (
    "20 SIGTERMs on two processes",
    lambda folder: disturbed.sweep_sigterms(folder, 20, 2),
  ),
  "losses": (
    "20 times one of two processes killed",
    lambda folder: disturbed.sweep_losses(folder, 20, 3),
  ),
  "flips": (
    "1,000 bits flipped in a checkpoint",
    lambda folder: checkpoints.sweep_flips(folder, 1000, 4),
  ),
  "kill": ("killed at each call of a save", lambda folder: checkpoints.sweep_calls(folder, "kill")),
  "EIO": ("EIO at each call of a save", lambda folder: checkpoints.sweep_calls(folder, "EIO")),
  "ENOSPC": (
    "ENOSPC from each call of a save on",
    lambda folder: checkpoints.sweep_calls(folder, "ENOSPC"),
  ),
}
RESULTS = {
  "kills": "{} runs, all with the bits of an undisturbed one",
  "sigterms": "all stopped after one step, at most {:.1f} s later; the same bits at the end",
  "losses": "the other one ended at most {:.1f} s later; the same bits at the end",
  "flips": "{} detected, the others did not change what is restored",
}


def main(names):
  for name in names or SWEEPS:
    title, sweep = SWEEPS[name]
    with tempfile.TemporaryDirectory() as folder:
      start = time.monotonic()
      result = sweep(folder)
      text = RESULTS.get(name, "{0[0]} of {0[1]} calls failed, valid checkpoints restored")
      seconds = time.monotonic() - start
      print(f"| {title} | {text.format(result)} | {seconds:.0f} s |", flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
