from distill_jax.jobs.cli import run

run()
