"""The learning rate in the log: of the optimizer's state, or of the schedule that is passed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_loop import run
from test_saver import make_state

from distill_jax.train import RunOptions
from distill_jax.train.learning_rate import with_learning_rate
from distill_jax.train.log import Log

PARAMS = {"student": {"learning_rate": jnp.ones(2)}, "objective": {"w": jnp.ones(2)}}
SCHEDULE = optax.linear_schedule(0.8, 0.0, 8)


def rates_of(optimizer, schedule=None, *, updates=1, skipped=0):
  """Returns the learning rates of the last of some updates."""
  state = make_state(updates - 1 + skipped)
  state = state._replace(skips=state.skips._replace(total=jnp.int32(skipped)))
  opt_state = optimizer.init(PARAMS)
  for _ in range(updates):
    _, opt_state = optimizer.update(PARAMS, opt_state, PARAMS)
  step = with_learning_rate(lambda *_: (state._replace(opt_state=opt_state), {"loss": 1}), schedule)
  with jax.numpy_dtype_promotion("strict"):
    _, metrics = step(state, (), {})
  assert metrics.pop("loss") == 1 and all(count == 1 for _, count in metrics.values())
  return {name: pytest.approx(float(rate)) for name, (rate, _) in metrics.items()}


def injected(rate):
  return optax.inject_hyperparams(optax.adam)(learning_rate=rate)


def test_rate_is_that_of_the_update():
  # Update number n of optax uses schedule(n - 1).
  assert rates_of(injected(SCHEDULE), updates=3) == {"learning_rate": 0.6}
  assert rates_of(optax.adam(SCHEDULE), SCHEDULE, updates=3) == {"learning_rate": 0.6}
  assert rates_of(optax.adam(SCHEDULE), SCHEDULE, updates=3, skipped=4) == {"learning_rate": 0.6}
  cosine = optax.cosine_decay_schedule(0.1, 8)
  expected = 0.05 * (1 + np.cos(np.pi * 2 / 8))
  assert rates_of(optax.adam(cosine), cosine, updates=3) == {"learning_rate": expected}
  assert rates_of(optax.adam(0.1), 0.1) == {"learning_rate": 0.1}
  chain = optax.chain(optax.clip(1.0), injected(0.3))
  assert rates_of(chain, SCHEDULE) == {"learning_rate": 0.3}
  assert rates_of(optax.adam(SCHEDULE)) == {}


def test_rates_of_groups_have_their_names():
  groups = {"student": injected(0.1), "objective": injected(SCHEDULE)}
  rates = rates_of(optax.partition(groups, {"student": "student", "objective": "objective"}))
  assert rates == {"learning_rate/student": 0.1, "learning_rate/objective": 0.8}


def test_log_has_the_mean_of_its_steps(capsys):
  fitted = run(
    optimizer=optax.adam(SCHEDULE), learning_rate=SCHEDULE, steps=4, log_every=2, progress=True
  )
  rates = [line["learning_rate"] for line in fitted.history if line["phase"] == "train"]
  np.testing.assert_allclose(rates, [0.75, 0.55], rtol=1e-6)
  assert "lr 0.55" in capsys.readouterr().out


def test_rate_does_not_hide_that_nothing_is_trained():
  sums = {"hard": (0.0, 0.0), "loss": (0.0, 2.0), "learning_rate": (0.2, 2.0)}
  with Log(None, start=0, steps=2, title="", progress=False) as log:
    with pytest.warns(UserWarning, match="source: .*hard"):
      log.train(2, sums, 16)


@pytest.mark.parametrize("rate", ["cosine", lambda: 0.1, lambda step, more: step])
def test_rate_of_another_type_is_rejected(rate):
  with pytest.raises(ValueError, match="^learning_rate: expected"):
    RunOptions(learning_rate=rate)
