from distill_jax.main import run

run()
