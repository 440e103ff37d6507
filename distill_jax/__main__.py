"""Runs the command line: `python -m distill_jax`."""

from distill_jax.jobs.cli import run

run()
