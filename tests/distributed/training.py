"""Runs in each process of test_training.py: trains on data that all share."""

import sys
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec
from spawning import join

from distill_jax import data, losses, objectives
from distill_jax.distributed import hosts, sharding
from distill_jax.models import from_apply
from distill_jax.train import Evaluation, RunOptions, StepOptions, fit
from distill_jax.types import Variables

CLASSES, WIDTH, ROWS = 4, 8, 100


def source(seed, rows=ROWS):
  rng = np.random.default_rng(seed)
  image = rng.normal(size=(rows, WIDTH)).astype(np.float32)
  label = image[:, :CLASSES].argmax(1).astype(np.int32)
  return data.Source(
    {"id": np.arange(rows), "image": image, "label": label}, classes=CLASSES, name="toy"
  )


def network(hidden, **kwargs):
  def init(key, x):
    del x
    up, down = jax.random.split(key)
    return {
      "up": 0.3 * jax.random.normal(up, (WIDTH, hidden)),
      "down": 0.3 * jax.random.normal(down, (hidden, CLASSES)),
    }

  def apply(w, x):
    hidden = jax.nn.relu(x @ w["up"])
    return {"logits": hidden @ w["down"], "hidden": hidden}

  return from_apply(init, apply, **kwargs)


def run(
  folder,
  steps,
  *,
  rate=1e-2,
  teacher=5,
  seed=0,
  examples=None,
  validation=None,
  patience=None,
  **options,
):
  """Trains a student of a wider teacher; one loss relates the rows of the global batch."""
  wide = network(48)
  teacher_variables = Variables(*wide.init(jax.random.key(teacher), source(0).arrays))
  gram = objectives.features("hidden", "hidden", losses.similarity_preserving, project=False)
  return fit(
    network(32),
    wide,
    objectives.weighted(
      hard=(0.5, objectives.labels()),
      soft=(0.5, objectives.logits(losses.kl_divergence, temperature=2.0)),
      gram=(1.0, gram),
    ),
    optax.adam(rate, eps=1e-4),
    examples or source(0),
    teacher_variables=teacher_variables,
    batch_size=16,
    steps=steps,
    checkpoints=folder,
    seed=seed,
    evaluation=Evaluation(validation or source(1, 30), every=5, patience=patience),
    step=StepOptions(mix=data.mixup(0.4, CLASSES)),
    run=RunOptions(**options),
  )


def pipeline(rows):
  """Returns a pipeline of a user's own that yields this process' rows."""

  def batches(start):
    for batch in data.batches(source(0), 16, seed=0, start=start):
      yield {name: x[rows] for name, x in batch.items()}

  batches.identity = "toy pipeline"
  return batches


def print_call(step, scores):
  print("called at", step, *sorted({name.partition("/")[0] for name in scores}), flush=True)


def train(how, folder, steps):
  """Trains in one of the ways of test_training.py, and returns arrays by name."""
  if how == "sharded":
    mesh = sharding.make_mesh(2, 2, 2)
    rules = [("up$", PartitionSpec("fsdp", "tensor")), ("down$", PartitionSpec("tensor", "fsdp"))]
    result = run(folder / "run", steps, mesh=mesh, rules=rules, teacher_rules=rules)
  elif how == "pipeline":
    rows = sharding.local_rows(sharding.make_mesh(), 16)
    result = run(folder / "run", steps, examples=pipeline(rows))
  elif how == "patience":
    # Without progress the second evaluation is the first that is not better.
    result = run(folder / "run", steps, rate=1e-30, patience=1, callbacks=[print_call])
    print("ended after", int(result.state.step), flush=True)
  else:
    index = jax.process_index()
    # Full batches, not this process' rows.
    validation = list(data.eval_batches(source(1, 32), 16))
    zeroed = data.Source(source(1, 30).arrays | {"label": np.zeros(30, np.int32)}, classes=CLASSES)
    options = {
      "plain": {},
      "learning rate": {"rate": 1e-2 + index / 100},
      "teacher": {"teacher": 5 + index},
      "seed": {"seed": index},
      "validation": {"validation": validation},
      "evaluation": {"validation": zeroed if index else source(1, 30)},
    }
    result = run(folder / "run", steps, **options[how])
  leaves = {
    "variables": sharding.gather_to_host(result.variables),
    "state": sharding.gather_to_host(result.state.params),
  }
  flat = jax.tree_util.tree_leaves_with_path(leaves)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in flat}


def main(how, folder, steps):
  arrays = train(how, folder, steps)
  if hosts.is_first():
    np.savez(folder / "out.npz", **arrays)


if __name__ == "__main__":
  join()
  main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
