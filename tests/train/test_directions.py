"""Optimizers that climb the loss are found before training."""

import warnings

import jax.numpy as jnp
import optax
import pytest

from distill_jax.train.directions import check_directions

PARAMS = {"student": {"head": jnp.ones((3, 4)), "hidden": jnp.ones(5)}, "objective": {}}
MASK = {"student": {"head": True, "hidden": False}, "objective": {}}
LABELS = {"student": {"head": "train", "hidden": "freeze"}, "objective": {}}


def test_a_masked_optimizer_does_not_freeze():
  with pytest.raises(ValueError, match="optimizer: .*student/hidden.*multi_transform"):
    check_directions(optax.masked(optax.adam(1e-2), MASK), PARAMS)


@pytest.mark.parametrize("optimizer", [optax.scale_by_adam(), optax.adam(-1e-2), optax.sgd(-1.0)])
def test_climbing_optimizers_warn(optimizer):
  with pytest.warns(UserWarning, match="optimizer: .*climbs"):
    check_directions(optimizer, PARAMS)


@pytest.mark.parametrize(
  "optimizer",
  [
    optax.adamw(1e-3, weight_decay=0.1),
    optax.sgd(optax.linear_schedule(0.0, 1.0, 10), momentum=0.9),
    optax.multi_transform({"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, LABELS),
    optax.adafactor(1e-3),
    optax.lion(1e-3),
    optax.chain(optax.clip_by_global_norm(1.0), optax.lamb(1e-3)),
    optax.MultiSteps(optax.adam(1e-3), 2),
    optax.contrib.schedule_free_adamw(1e-3),
  ],
)
def test_optimizers_that_descend_pass(optimizer):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    check_directions(optimizer, PARAMS)
