"""Losses, `make_loss_fn` and `make_train_step` in a loop of one's own with optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import losses, reduce
from distill_jax.train import StepOptions, make_init, make_loss_fn, make_train_step


def test_loss_is_unreduced_and_scaled_by_t_squared(rng):
  s, t = rng.normal(size=(2, 6, 5)).astype(np.float32)
  q, p = (np.exp(x / 4) / np.exp(x / 4).sum(-1, keepdims=True) for x in (s, t))
  expected = 16 * (p * np.log(p / q)).sum(-1)
  actual = jax.jit(losses.kl_divergence)(s, t, temperature=4.0)
  assert actual.shape == (6,)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


def test_loss_rejects_other_shapes_and_temperature():
  with pytest.raises(ValueError, match=r"shape"):
    losses.kl_divergence(jnp.zeros((2, 3)), jnp.zeros((2, 4)))
  with pytest.raises(ValueError, match=r"temperature"):
    losses.kl_divergence(jnp.zeros((2, 3)), jnp.zeros((2, 3)), temperature=0.0)


def test_loop_of_plain_jax_ignores_padded_rows(batch):
  params = {"w": jnp.zeros((4, 3))}
  where = np.arange(16) < 12
  teacher_logits = batch["x"] @ np.ones((4, 3), np.float32) * np.arange(3, dtype=np.float32)
  x = np.where(where[:, None], batch["x"], np.nan)

  def loss_fn(params, x, label, teacher_logits, where=None):
    logits = x @ params["w"]
    hard = -(jax.nn.one_hot(label, 3) * jax.nn.log_softmax(logits)).sum(-1)
    soft = losses.kl_divergence(logits, teacher_logits, temperature=4.0)
    return reduce.mean(0.1 * hard + 0.9 * soft, where=where)

  value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
  padded = value_and_grad(params, batch["x"], batch["label"], teacher_logits, where)
  short = value_and_grad(params, batch["x"][:12], batch["label"][:12], teacher_logits[:12])
  np.testing.assert_allclose(padded[0], short[0], rtol=1e-5)
  np.testing.assert_allclose(padded[1]["w"], short[1]["w"], rtol=1e-4, atol=1e-6)
  # `reduce` promises that a blanked row may be NaN.
  blanked = reduce.blank(where, (x, teacher_logits))
  dirty = value_and_grad(params, blanked[0], batch["label"], blanked[1], where)
  np.testing.assert_allclose(dirty[0], short[0], rtol=1e-5)
  np.testing.assert_allclose(dirty[1]["w"], short[1]["w"], rtol=1e-4, atol=1e-6)


def test_metrics_of_steps_merge_as_sums(rng):
  values = rng.normal(size=12).astype(np.float32)
  parts = [{"loss": reduce.total(v)} for v in np.split(values, [2, 5])]
  np.testing.assert_allclose(reduce.value(reduce.merge(*parts)["loss"]), values.mean(), rtol=1e-5)


def test_loss_fn_trains_with_optax(student, teacher, objective, batch):
  optimizer = optax.adam(0.1)
  state = jax.jit(make_init(student, teacher, objective, optimizer))(jax.random.key(0), batch)
  loss_fn = make_loss_fn(student, teacher, objective)

  @jax.jit
  def update(params, opt_state, step):
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      params, state.model_state, teacher.variables, batch, step=step, key=jax.random.key(1)
    )
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, aux

  params, opt_state, curve = state.params, state.opt_state, []
  for step in range(20):
    params, opt_state, loss, aux = update(params, opt_state, jnp.int32(step))
    curve.append(float(loss))
  assert curve[-1] < 0.5 * curve[0]
  assert set(aux.terms) == {"hard", "soft"} and set(aux.model_state) == {"student", "objective"}
  assert aux.outputs["logits"].shape == (16, 3) and loss.dtype == jnp.float32
  means = {name: reduce.value(pair) for name, pair in aux.terms.items()}
  np.testing.assert_allclose(curve[-1], 0.1 * means["hard"] + 0.9 * means["soft"], rtol=1e-5)


def test_loss_fn_without_teacher(student, baseline, batch):
  state = jax.jit(make_init(student, None, baseline, optax.sgd(0.1)))(jax.random.key(0), batch)
  loss_fn = jax.jit(make_loss_fn(student, None, baseline))
  loss, _ = loss_fn(
    state.params, state.model_state, (), batch, step=jnp.int32(0), key=jax.random.key(0)
  )
  logits = batch["x"] @ state.params["student"]["w"]
  expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_step_applies_the_gradient_of_loss_fn(student, teacher, objective, batch):
  optimizer = optax.sgd(0.5)
  state = jax.jit(make_init(student, teacher, objective, optimizer))(jax.random.key(0), batch)
  grads, _ = jax.jit(jax.grad(make_loss_fn(student, teacher, objective), has_aux=True))(
    state.params, state.model_state, teacher.variables, batch, step=state.step, key=state.key
  )
  expected = jax.tree.map(lambda p, g: np.asarray(p - 0.5 * g), state.params, grads)
  for microbatches in (1, 4):
    step = make_train_step(
      student, teacher, objective, optimizer, StepOptions(microbatches=microbatches)
    )
    new_state, metrics = jax.jit(step)(state, teacher.variables, batch)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
      new_state.params,
      expected,
    )
    assert int(new_state.step) == int(state.step) + 1
    assert {"loss", "hard", "soft", "grad_norm", "nonfinite", "empty"} <= set(metrics)
    assert all(len(pair) == 2 for pair in metrics.values())


def test_update_that_is_not_finite_is_skipped(student, teacher, objective, batch):
  optimizer = optax.adam(0.1)
  state = jax.jit(make_init(student, teacher, objective, optimizer))(jax.random.key(0), batch)
  step = jax.jit(make_train_step(student, teacher, objective, optimizer))
  bad = {**batch, "x": np.full_like(batch["x"], np.inf)}
  new_state, metrics = step(state, teacher.variables, bad)
  np.testing.assert_array_equal(new_state.params["student"]["w"], state.params["student"]["w"])
  assert float(reduce.value(metrics["nonfinite"])) == 1.0 and float(metrics["loss"][1]) == 0.0
  assert int(new_state.skips.total) == int(new_state.skips.streak) == 1


def test_step_rejects_what_does_not_fit(student, teacher, objective, batch):
  with pytest.raises(ValueError, match=r"microbatches"):
    StepOptions(microbatches=0)
  state = jax.jit(make_init(student, teacher, objective, optax.sgd(0.1)))(jax.random.key(0), batch)
  step = make_train_step(student, teacher, objective, optax.sgd(0.1), StepOptions(microbatches=3))
  with pytest.raises(ValueError, match=r"microbatches"):
    step(state, teacher.variables, batch)
  step = make_train_step(student, teacher, objective, optax.sgd(0.1))
  with pytest.raises(ValueError, match=r"teacher"):
    step(state, (), batch)
  with pytest.raises(ValueError, match=r"label"):
    step(state, teacher.variables, {"x": batch["x"]})
