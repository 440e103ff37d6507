"""Trains from a cache, resumes and evaluates: a test runs it under strict settings of JAX."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax import data, losses, objectives, tasks
from distill_jax.cache import TopK, write_cache
from distill_jax.models import from_apply
from distill_jax.train import RunOptions, StepOptions, evaluate, fit, predict

CLASSES, ROWS, WIDTH = 5, 16, 3


def apply(params, x):
  return x @ params["kernel"] + params["bias"][None]


def init(key, x):
  kernel = jax.random.normal(key, (x.shape[-1], CLASSES), x.dtype)
  return {"kernel": kernel, "bias": jnp.zeros(CLASSES, x.dtype)}


def main(folder: Path) -> None:
  rng = np.random.default_rng(0)
  pixels = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
  label = rng.integers(0, CLASSES, ROWS)
  source = data.Source({"image": pixels, "label": label}, CLASSES, name="toy")
  teacher = from_apply(None, apply, variables=init(jax.random.key(1), pixels))
  student = from_apply(init, apply)
  cached = write_cache(folder / "cache", teacher, source, {"logits": TopK(3)}, progress=False)
  objective = objectives.weighted(
    hard=(0.1, objectives.labels()),
    soft=(optax.linear_schedule(0.5, 1.0, 2), objectives.sparse(losses.sparse_kl)),
  )

  def train(steps):
    return fit(
      student,
      cached,
      objective,
      optax.adamw(optax.cosine_decay_schedule(1e-2, 4)),
      source,
      steps=steps,
      batch_size=8,
      evaluation=source,
      checkpoints=folder / "run",
      step=StepOptions(microbatches=2),
      run=RunOptions(progress=False),
    )

  train(2)
  result = train(4)
  scores = evaluate(student, result.variables, source, tasks.classification())
  outputs = predict(student, result.variables, source)
  print(int(result.state.step), scores["nll"] > 0, outputs["logits"].shape)


main(Path(sys.argv[1]))
