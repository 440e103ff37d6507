"""Runs a process of test_cache_hosts.py: all write one cache, then train from it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec
from spawning import join
from toys import AUGMENT, images, linear, student, written

from distill_jax import losses, objectives
from distill_jax.cache import writer
from distill_jax.cache.store import shards
from distill_jax.distributed import sharding
from distill_jax.train import RunOptions, StepOptions, fit
from distill_jax.types import Variables


def main(folder):
  """Returns the shards that this process wrote, and the sum of the student's parameters."""
  writer.SHARD_BATCHES = 1
  source, teacher = images(np.random.default_rng(0)), linear()
  mesh = sharding.make_mesh()
  rows = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
  kernel = np.asarray(teacher.variables.params)
  # A run that trained the teacher leaves its weights on the devices of all processes.
  weights = jax.make_array_from_callback(kernel.shape, rows, lambda index: kernel[index])
  numbers, write_shard = [], shards.write_shard

  def record_and_write(store, manifest, number, *arrays):
    numbers.append(number)
    return write_shard(store, manifest, number, *arrays)

  shards.write_shard = record_and_write
  variables = Variables(weights, teacher.variables.state)
  options = dict(augment=AUGMENT, num_views=2, teacher_variables=variables)
  cached = written(folder, source, teacher, **options)
  objective = objectives.weighted(soft=(1.0, objectives.logits(losses.kl_divergence)))
  result = fit(
    student(),
    cached,
    objective,
    optax.sgd(0.1),
    source,
    steps=6,
    batch_size=16,
    step=StepOptions(augment=AUGMENT),
    run=RunOptions(mesh=mesh, progress=False),
  )
  leaves = jax.tree.leaves(result.variables.params)
  return numbers, sum(float(np.abs(np.asarray(leaf)).sum()) for leaf in leaves)


if __name__ == "__main__":
  join()
  numbers, learned = main(sys.argv[1])
  print(f"wrote {' '.join(map(str, numbers))}")
  print("learned", learned)
