"""What each process does in test_cache_hosts.py: all write one cache, then all train from it."""

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
from distill_jax.distributed import sharding
from distill_jax.train import RunOptions, StepOptions, fit
from distill_jax.types import Variables


def main(folder):
  """The shards that this process wrote, and the sum of what the student learned."""
  writer.SHARD_BATCHES = 1
  source, teacher = images(np.random.default_rng(0)), linear()
  mesh = sharding.make_mesh()
  spread = jax.sharding.NamedSharding(mesh, PartitionSpec("data"))
  kernel = np.asarray(teacher.variables.params)
  # As a run leaves them that trained the teacher: over the devices of all processes.
  weights = jax.make_array_from_callback(kernel.shape, spread, lambda index: kernel[index])
  mine, put = [], writer.shards.write_shard
  writer.shards.write_shard = lambda store, made, number, *rest: (
    mine.append(number) or put(store, made, number, *rest)
  )
  cached = written(
    folder,
    source,
    teacher,
    augment=AUGMENT,
    num_views=2,
    teacher_variables=Variables(weights, teacher.variables.state),
  )
  objective = objectives.weighted(soft=(1.0, objectives.logits(losses.kl_divergence)))
  fitted = fit(student(), cached, objective, optax.sgd(0.1), source, steps=6, batch_size=16, step=StepOptions(augment=AUGMENT), run=RunOptions(mesh=mesh, progress=False))
  total = sum(
    float(np.abs(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(fitted.variables.params)
  )
  return mine, total


if __name__ == "__main__":
  join()
  wrote, learned = main(sys.argv[1])
  print("wrote", *wrote)
  print("learned", learned)
