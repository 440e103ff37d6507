"""Runs the command line: `python -m distill_jax`."""

from distill_jax.errors import naming_extras

with naming_extras():
  from distill_jax.jobs.cli import run

run()
