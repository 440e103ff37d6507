"""Runs the command line in each process of test_command.py, with the flags of several processes."""

import sys

from spawning import join_arguments

from distill_jax.jobs.cli import run

if __name__ == "__main__":
  address, count, process = join_arguments()
  flags = [
    f"--coordinator_address={address}",
    f"--num_processes={count}",
    f"--process_id={process}",
  ]
  run([*sys.argv[1:], *(flags if count > 1 else [])])
