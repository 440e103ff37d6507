"""Trains a run that a sweep disturbs, as one of its processes: `python train.py FOLDER STEPS`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import jax
import numpy as np
import optax
from spawning import join
from training import network, source

from distill_jax import losses, objectives
from distill_jax.distributed import hosts
from distill_jax.distributed.interruption import Interrupted
from distill_jax.train import CheckpointOptions, Evaluation, RunOptions, fit
from distill_jax.types import Variables

EVERY = 20


def train(folder, steps):
  wide = network(48)
  return fit(
    network(32),
    wide,
    objectives.weighted(
      hard=(0.5, objectives.labels()),
      soft=(0.5, objectives.logits(losses.kl_divergence, temperature=2.0)),
    ),
    optax.adam(1e-3),
    source(0),
    teacher_variables=Variables(*wide.init(jax.random.key(5), source(0).arrays)),
    batch_size=16,
    steps=steps,
    checkpoints=CheckpointOptions(folder, every=EVERY),
    evaluation=Evaluation(source(1, 30), every=10 * EVERY),
    run=RunOptions(log_every=EVERY, progress=False),
  )


if __name__ == "__main__":
  join()
  folder = Path(sys.argv[1])
  try:
    result = train(folder, int(sys.argv[2]))
  except Interrupted as interrupted:
    print("stopped after", int(interrupted.state.step), flush=True)
    raise
  if hosts.is_first():
    leaves = jax.tree_util.tree_leaves_with_path(
      (result.variables, result.state.params, result.state.opt_state)
    )
    np.savez(
      folder / "out.npz", **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    )
