"""Resumed pruning matches an uninterrupted run bit for bit: weights, masks, moments, schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax import objectives
from distill_jax.compression.pruning.channels import prune_channels
from distill_jax.compression.pruning.groups import groups_of, under
from distill_jax.compression.pruning.masks import PolynomialSchedule
from distill_jax.compression.pruning.weights import hold_zeros, prune, prune_n_by_m
from distill_jax.compression.regularizers.groups import proximal_groups
from distill_jax.models import from_nnx
from distill_jax.models.zoo.mlp import MLP
from distill_jax.storage.checkpoint import Checkpoints
from distill_jax.train import make_init, make_train_step

MODEL = from_nnx(lambda rngs: MLP(16, (16, 8), 4, rngs=rngs))
SCHEDULE = PolynomialSchedule(1, 7, 2)
PRUNERS = 4


def half_zero(key, batch):
  variables = MODEL.init(key, batch)
  return variables._replace(params=jax.tree.map(lambda w: jnp.maximum(w, 0), variables.params))


def groups(params):
  return under("student", groups_of(params["student"]))


def all_pruners():
  """Returns an optimizer with the state of every pruner, one inside the other."""
  optimizer = optax.chain(optax.adam(0.01), proximal_groups(groups, lambda step: 0.0005 * step))
  optimizer = hold_zeros(optimizer, "kernel$")
  optimizer = prune_channels(optimizer, groups, SCHEDULE, sparsity=0.25, distribution="global")
  optimizer = prune_n_by_m(optimizer, 2)
  return prune(optimizer, SCHEDULE, sparsity=0.8, distribution="global")


def program(batch):
  """Returns the first state and the train step as a new process makes them."""
  student = MODEL._replace(init=half_zero)
  objective = objectives.weighted(hard=(1.0, objectives.labels()))
  optimizer = all_pruners()
  state = jax.jit(make_init(student, None, objective, optimizer))(jax.random.key(0), batch)
  return state, jax.jit(make_train_step(student, None, objective, optimizer))


def test_masks_survive_a_checkpoint_and_a_new_program(rng, tmp_path):
  batches = [
    {
      "image": rng.normal(size=(8, 16)).astype(np.float32),
      "label": rng.integers(0, 4, 8).astype(np.int32),
      "where": np.ones(8, bool),
    }
    for _ in range(9)
  ]
  full, step = program(batches[0])
  with Checkpoints(tmp_path) as checkpoints:
    for i, batch in enumerate(batches):
      if i == 4:
        checkpoints.save(full)
      full, _ = step(full, (), batch)
  first, step = program(batches[0])
  resumed = Checkpoints(tmp_path, read_only=True).restore(first)
  pruner = resumed.opt_state
  for _ in range(PRUNERS):
    masks = [np.asarray(mask) for mask in jax.tree.leaves(pruner.masks)]
    assert all(mask.dtype == bool for mask in masks) and not all(mask.all() for mask in masks)
    pruner = pruner.inner
  for batch in batches[4:]:
    resumed, _ = step(resumed, (), batch)
  assert 0 < (np.asarray(resumed.params["student"]["hidden"][0]["kernel"]) == 0).mean() < 1
  for a, b in zip(
    jax.tree.leaves((full.params, full.opt_state)),
    jax.tree.leaves((resumed.params, resumed.opt_state)),
    strict=True,
  ):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
