"""A linear student and its teacher on 3 classes, as a user of the documentation writes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import data, losses, objectives
from distill_jax.models import from_apply
from distill_jax.types import Model

TRUE_WEIGHTS = np.random.default_rng(7).normal(size=(4, 3)).astype(np.float32)


def _init(key, x):
  return {"w": 0.1 * jax.random.normal(key, (x.shape[-1], 3)), "b": jnp.zeros(3)}


def _apply(params, x):
  return x @ params["w"] + params["b"]


@pytest.fixture(scope="session")
def student() -> Model:
  return from_apply(_init, _apply, inputs="x")


@pytest.fixture(scope="session")
def teacher() -> Model:
  """Knows the true weights."""
  variables = {"w": jnp.asarray(3 * TRUE_WEIGHTS), "b": jnp.zeros(3)}
  return from_apply(_init, _apply, variables=variables, inputs="x")


@pytest.fixture(scope="session")
def examples() -> data.Source:
  x = np.random.default_rng(0).normal(size=(120, 4)).astype(np.float32)
  label = (x @ TRUE_WEIGHTS).argmax(-1)
  return data.Source({"x": x, "label": label}, classes=3, name="planes")


@pytest.fixture(scope="session")
def train(examples) -> data.Source:
  return examples.take(slice(0, 96))


@pytest.fixture(scope="session")
def validation(examples) -> data.Source:
  """24 examples: the last batch of 16 is padded."""
  return examples.take(slice(96, 120))


@pytest.fixture(scope="session")
def batch(train) -> dict:
  return next(data.batches(train, 16, seed=0))


@pytest.fixture(scope="session")
def objective():
  return objectives.weighted(
    hard=(0.1, objectives.labels()),
    soft=(0.9, objectives.logits(losses.kl_divergence, temperature=2.0)),
  )


@pytest.fixture(scope="session")
def baseline():
  return objectives.weighted(hard=(1.0, objectives.labels()))
