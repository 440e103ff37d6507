"""Pruned runs that are stopped go on as if they had not been: weights, masks, moments and schedules, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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

STUDENT = from_nnx(lambda rngs: MLP(16, (16, 8), 4, rngs=rngs))
SCHEDULE = PolynomialSchedule(1, 7, 2)


def groups(params):
  return under("student", groups_of(params["student"]))


def channels(inner):
  return prune_channels(inner, groups, SCHEDULE, sparsity=0.5, distribution="global")


def half_zero(key, batch):
  variables = STUDENT.init(key, batch)
  return variables._replace(params=jax.tree.map(lambda w: jnp.maximum(w, 0), variables.params))


PRUNERS = {
  "weights": lambda inner: prune(inner, SCHEDULE, sparsity=0.8, distribution="global"),
  "2:4": lambda inner: prune_n_by_m(inner, 2),
  "channels": channels,
  "zeros": hold_zeros,
  "group lasso": lambda inner: optax.chain(
    inner, proximal_groups(groups, lambda step: 0.0065 * step)
  ),
}


@pytest.mark.parametrize("name", PRUNERS)
def test_masks_survive_a_checkpoint_and_a_new_program(rng, tmp_path, name):
  batches = [
    {
      "image": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32),
      "label": jnp.asarray(rng.integers(0, 4, 8)),
      "where": jnp.ones(8, bool),
    }
    for _ in range(9)
  ]

  def program():
    """What a process that starts anew makes."""
    student = STUDENT._replace(init=half_zero) if name == "zeros" else STUDENT
    objective = objectives.weighted(hard=(1.0, objectives.labels()))
    optimizer = PRUNERS[name](optax.adam(0.01))
    state = jax.jit(make_init(student, None, objective, optimizer))(jax.random.key(0), batches[0])
    return state, jax.jit(make_train_step(student, None, objective, optimizer))

  whole, step = program()
  for batch in batches:
    whole, _ = step(whole, (), batch)
  state, step = program()
  with Checkpoints(tmp_path) as checkpoints:
    for batch in batches[:4]:
      state, _ = step(state, (), batch)
    checkpoints.save(state)
  fresh, step = program()
  resumed = Checkpoints(tmp_path, read_only=True).restore(fresh)
  if name != "group lasso":
    masks = jax.tree.leaves(resumed.opt_state.masks)
    assert all(mask.dtype == bool for mask in masks) and not all(mask.all() for mask in masks)
  for batch in batches[4:]:
    resumed, _ = step(resumed, (), batch)
  assert 0 < (resumed.params["student"]["hidden"][0]["kernel"] == 0).mean() < 1
  for a, b in zip(
    jax.tree.leaves((whole.params, whole.opt_state)),
    jax.tree.leaves((resumed.params, resumed.opt_state)),
    strict=True,
  ):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
