"""Tests what `fit` notices on its first batch, before training."""

import jax
import optax
import pytest
from test_loop import linear, run, source, teacher

from distill_jax import losses, objectives, teachers
from distill_jax.train import make_init
from distill_jax.train.arguments import Arguments, Inputs
from distill_jax.train.first_batch import warn_of_unread_teacher

HARD = objectives.weighted(hard=(1.0, objectives.labels()))


def check(network, objective):
  batch = {name: x[:8] for name, x in source().arrays.items()}
  state = make_init(linear(), network, objective, optax.sgd(0.1))(jax.random.key(0), batch)
  values = dict.fromkeys(Arguments._fields) | {
    "student": linear(),
    "teacher": network,
    "objective": objective,
  }
  variables = () if network.ema_update is not None else network.variables
  warn_of_unread_teacher(Arguments(**values), Inputs(None, None, batch, variables), state)


@pytest.mark.parametrize("network", [teacher(), teachers.moving_average(linear())])
def test_teacher_that_no_term_reads_warns(network):
  with pytest.warns(UserWarning, match="^teacher: expected a term .*'logits'.*teacher=None"):
    check(network, HARD)
  soft = objectives.logits(losses.kl_divergence)
  check(network, objectives.weighted(hard=(1.0, objectives.labels()), soft=(0.0, soft)))


def test_fit_warns_of_a_teacher_that_no_term_reads():
  with pytest.warns(UserWarning, match="^teacher: expected a term"):
    run(steps=1, objective=HARD, validation=None)
