"""What each process does in test_command.py: the command line, with the flags of a run of several processes."""

import sys

from spawning import place

from distill_jax.jobs.cli import run

if __name__ == "__main__":
  address, count, process = place()
  flags = [
    f"--coordinator_address={address}",
    f"--num_processes={count}",
    f"--process_id={process}",
  ]
  run([*sys.argv[1:], *(flags if count > 1 else [])])
