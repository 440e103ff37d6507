"""Given targets are scored as beams score them, and sets of any size are decoded by `predict`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_steps import END, sources, steps_of, table

from distill_jax import data, train
from distill_jax.data import UNLABELED
from distill_jax.models.decoding import (
  beam_search,
  decoding_model,
  sampler,
  sequence_log_probs,
  target_rows,
)


def by_steps(steps, variables, batch, inputs):
  """Returns the logits [B, T, V] of given decoder inputs."""
  cache = steps.start(variables, batch, inputs.shape[1])
  logits = []
  for position in range(inputs.shape[1]):
    z, cache = steps.step(variables, inputs[:, position], jnp.int32(position), cache)
    logits.append(z)
  return jnp.stack(logits, 1)


def test_log_probs_of_a_beam_are_its_scores():
  steps, variables, batch = steps_of(5), table(5), sources(24)
  search = beam_search(steps, max_length=6, beam_size=2, length_penalty=0.0)
  beams = jax.jit(search)(variables, batch)
  inputs, label = target_rows(beams.tokens[:, 1], beams.lengths[:, 1], start_token=1, end_token=END)
  assert {0, 1, 6} & set(beams.lengths[:, 1].tolist()) and (label != END).all(1).any()
  np.testing.assert_array_equal((label >= 0).sum(1), jnp.minimum(beams.lengths[:, 1] + 1, 6))

  @jax.jit
  def score(variables, batch, inputs, label):
    return sequence_log_probs({"logits": by_steps(steps, variables, batch, inputs)}, label)

  log_probs = score(variables, batch, inputs, label)
  assert (log_probs[label < 0] == 0).all()
  np.testing.assert_allclose(log_probs.sum(1), beams.scores[:, 1], rtol=1e-5)


@pytest.mark.parametrize("memory", [1, 4 * 3 * 11 * 2])
def test_hidden_states_and_head_score_as_their_logits(memory):
  rng = np.random.default_rng(0)
  hidden, kernel = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in ((3, 5, 4), (4, 11)))
  bias = jnp.arange(11.0) / 5
  label = jnp.asarray(rng.integers(-1, 11, (3, 5))).at[0, 0].set(UNLABELED)
  logits = 3 * jnp.tanh((hidden @ kernel + bias) / 3)

  def total(hidden):
    outputs = {"hidden": hidden, "head": (kernel, bias, 3.0)}
    return sequence_log_probs(outputs, label, memory=memory).sum()

  def expected(hidden):
    z = jax.nn.log_softmax(3 * jnp.tanh((hidden @ kernel + bias) / 3))
    picked = jnp.take_along_axis(z, jnp.maximum(label, 0)[..., None], -1)[..., 0]
    return jnp.where(label >= 0, picked, 0).sum()

  for found, wanted in zip(*(jax.jit(jax.value_and_grad(f))(hidden) for f in (total, expected))):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  outside = sequence_log_probs({"logits": logits}, label.at[0, 0].set(11))
  assert np.isnan(outside).sum() == 1
  half = sequence_log_probs({"logits": logits.astype(jnp.bfloat16)}, label)
  assert half.dtype == jnp.float32


def test_sets_are_decoded_by_predict():
  steps, variables = steps_of(5), table(5)
  batch = {name: np.asarray(x) for name, x in sources(11).items()}
  expected = jax.jit(sampler(steps, max_length=6))(variables, None, batch)
  traced = []

  def sample(variables, key, batch):
    traced.append(batch["source"].shape)
    return sampler(steps, max_length=6)(variables, key, batch)

  model = decoding_model(sample)
  source = data.Source(batch)
  outputs = train.predict(model, variables, source, batch_size=4)
  np.testing.assert_array_equal(outputs["tokens"], expected[0])
  np.testing.assert_array_equal(outputs["lengths"], expected[1])
  # Batches of two lengths: zeros change no sum, and so no sequence.
  rows = [{"source": np.pad(batch["source"][i : i + 4], ((0, 0), (0, i // 4)))} for i in (0, 4)]
  for new_shapes in ({(4, 3), (4, 4)}, set()):  # compiled once for each
    traced.clear()
    outputs = train.predict(model, variables, [*rows, *rows])
    assert set(traced) == new_shapes
    np.testing.assert_array_equal(outputs["tokens"], np.concatenate([expected[0][:8]] * 2))


def test_what_cannot_be_scored_is_refused_by_name():
  label = jnp.zeros((2, 3), int)
  with pytest.raises(ValueError, match="outputs"):
    sequence_log_probs({"hidden": jnp.zeros((2, 3, 4))}, label)
  with pytest.raises(ValueError, match="label"):
    sequence_log_probs({"logits": jnp.zeros((2, 4, 4))}, label)
  with pytest.raises(ValueError, match="variables"):
    train.predict(decoding_model(lambda *_: None), None, {"source": np.zeros((2, 3))})
