"""What each process does in test_training.py: trains on data that all share."""

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
from distill_jax.train import fit
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


def run(folder, steps, **kwargs):
  """Twenty steps of a student of a wider teacher, with a loss that relates the rows of the whole batch."""
  wide = network(48)
  teacher_outputs = Variables(
    *wide.init(jax.random.key(kwargs.pop("teacher", 5)), source(0).arrays)
  )
  gram = objectives.features("hidden", "hidden", losses.similarity_preserving, project=False)
  return fit(
    network(32),
    wide,
    objectives.weighted(
      hard=(0.5, objectives.labels()),
      soft=(0.5, objectives.logits(losses.kl_divergence, temperature=2.0)),
      gram=(1.0, gram),
    ),
    optax.adam(kwargs.pop("rate", 1e-2), eps=1e-4),
    kwargs.pop("source", source(0)),
    teacher_variables=teacher_outputs,
    batch_size=16,
    steps=steps,
    folder=folder,
    eval_every=5,
    validation=kwargs.pop("validation", source(1, 30)),
    mix=data.mixup(0.4, CLASSES),
    **kwargs,
  )


def pipeline(rows):
  """A pipeline of one's own, that gives this process' rows."""

  def batches(start):
    for batch in data.batches(source(0), 16, seed=0, start=start):
      yield {name: x[rows] for name, x in batch.items()}

  batches.identity = "toy pipeline"
  return batches


def main(how, folder, steps):
  folder = Path(folder)
  if how == "spread":
    mesh = sharding.make_mesh(2, 2, 2)
    rules = [("up$", PartitionSpec("fsdp", "tensor")), ("down$", PartitionSpec("tensor", "fsdp"))]
    fitted = run(folder / "run", steps, mesh=mesh, rules=rules, teacher_rules=rules)
  elif how == "pipeline":
    rows = sharding.local_rows(sharding.make_mesh(), 16)
    fitted = run(folder / "run", steps, source=pipeline(rows))
  else:
    index = jax.process_index()
    different = {
      "learning rate": {"rate": 1e-2 + index / 100},
      "teacher": {"teacher": 5 + index},
      "seed": {"seed": index},
      "validation": {"validation": list(data.eval_batches(source(1, 32), 16))},  # whole batches
    }
    fitted = run(folder / "run", steps, **different.get(how, {}))
  variables = sharding.gather_to_host(fitted.variables)
  state = sharding.gather_to_host(fitted.state.params)
  if hosts.is_first():
    leaves = {"variables": variables, "state": state}
    flat = jax.tree_util.tree_leaves_with_path(leaves)
    np.savez(folder / "out.npz", **{jax.tree_util.keystr(path): np.asarray(x) for path, x in flat})


if __name__ == "__main__":
  join()
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
