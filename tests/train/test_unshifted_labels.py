"""Labels of a language model that are its input, not the next tokens."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fitting import fit_with

from distill_jax import objectives
from distill_jax.data.text import mask_tokens
from distill_jax.distributed import sharding
from distill_jax.models import from_apply
from distill_jax.train.batch_checks import Checks, checked_batch, warn_of_unshifted_labels

TOKENS = np.array([[3, 1, 2, 0], [1, 1, 4, 2]])
NEXT = np.array([[1, 2, 0, -100], [1, 4, 2, -100]])


def found(label, classes=5, augment=None, **entries):
  """Returns the warnings about a batch with these labels."""
  checks = Checks({"label": classes}, -100)
  batch = checked_batch({"tokens": TOKENS, "label": label, **entries}, checks)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    warn_of_unshifted_labels(batch, checks, augment)
  return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("label", [TOKENS, np.where(TOKENS == 1, -100, TOKENS)])
def test_labels_that_are_the_input_warn_once(label):
  (message,) = found(label, segments=np.ones((2, 4), int))
  assert message.startswith("label: expected each position's next token, got 'tokens'")


@pytest.mark.parametrize(
  ("label", "entries"),
  [
    (NEXT, {}),
    (np.where(TOKENS == 4, 0, TOKENS), {}),  # one label differs
    (np.full((2, 4), -100), {}),
    (np.zeros((2, 4), int), {"segments": np.zeros((2, 4), int)}),  # next tokens, too
    (TOKENS[:, 0], {"first": TOKENS[:, 0]}),  # one class a row
  ],
)
def test_other_labels_do_not_warn(label, entries):
  assert found(label, **entries) == []


def test_labels_of_hidden_tokens_do_not_warn():
  numbers = {"id": np.arange(2), "view": np.zeros(2, int)}
  augment = mask_tokens(0.9, mask=0, keep=(), seed=0, label="label")
  assert found(TOKENS, augment=augment, **numbers) == []
  assert len(found(TOKENS, augment=lambda batch: batch, **numbers)) == 1


def test_numbers_to_predict_may_be_the_input():
  assert found(TOKENS, classes=None) == []


def test_fit_warns_before_training():
  student = from_apply(lambda key, tokens: jnp.zeros((5, 5)), lambda w, x: w[x], inputs=("tokens",))
  objective = objectives.weighted(hard=(1.0, objectives.labels()))
  batches = [{"tokens": TOKENS, "label": TOKENS}]
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  # Warnings are errors in tests.
  with pytest.raises(UserWarning, match="^label: .*'tokens'"):
    fit_with(student, None, objective, optax.sgd(0.1), batches, steps=1, batch_size=2, mesh=mesh)
