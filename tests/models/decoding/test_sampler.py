"""Sequences are greedy or sampled as softmax says, by key and id, and end where they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_steps import END, log_probs, sources, split_rows, steps_of, table

from distill_jax.models.decoding import sampler


def greedy_by_hand(variables, source, max_length):
  tokens = []
  while len(tokens) < max_length:
    new = int(log_probs(variables, source, tokens).argmax())
    if new == END:
      break
    tokens.append(new)
  return tokens


def test_greedy_equals_the_most_probable_tokens_one_by_one():
  variables = table(5)
  batch = sources(32)
  tokens, lengths = jax.jit(sampler(steps_of(5), max_length=6))(variables, None, batch)
  expected = [greedy_by_hand(variables, row, 6) for row in np.asarray(batch["source"])]
  assert {0, 6} < {len(row) for row in expected}  # some never end, some are empty
  assert lengths.tolist() == [len(row) for row in expected]
  assert tokens.tolist() == [row + [END] * (6 - len(row)) for row in expected]


def test_sequences_are_sampled_as_often_as_they_are_probable():
  variables, rows, temperature = table(3, scale=1.0), 20_000, 0.7
  batch = {"id": jnp.arange(rows), "source": jnp.ones((rows, 2))}
  sample = jax.jit(sampler(steps_of(3), max_length=2, temperature=temperature))
  tokens = np.asarray(sample(variables, jax.random.key(0), batch)[0])
  scaled = variables._replace(params=variables.params / temperature)
  first = log_probs(scaled, [1, 1], [])
  probability = np.zeros((3, 3))
  probability[END, END] = np.exp(first[END])
  for token in (1, 2):
    probability[token] = np.exp(first[token] + log_probs(scaled, [1, 1], [token]))
  counts = np.zeros((3, 3))
  np.add.at(counts, tuple(tokens.T), 1)
  valid = probability > 0
  chi_square = ((counts - rows * probability)[valid] ** 2 / (rows * probability[valid])).sum()
  assert not counts[~valid].any()
  assert chi_square < 22.5  # 6 degrees of freedom: exceeded by 1 key in 1,000


def test_samples_depend_on_key_and_id_only():
  variables = table(5, scale=0.5)
  sample = jax.jit(sampler(steps_of(5), max_length=6, temperature=1.0))
  batch = sources(16) | {"source": jnp.ones((16, 3), jnp.int32)}
  tokens, lengths = sample(variables, jax.random.key(0), batch)
  assert len(np.unique(tokens, axis=0)) > 8
  order = np.random.default_rng(0).permutation(16)
  moved = {name: x[order] for name, x in batch.items()}
  np.testing.assert_array_equal(sample(variables, jax.random.key(0), moved)[0], tokens[order])
  padded = batch | {"where": jnp.arange(16) < 12}
  of_padded = sample(variables, jax.random.key(0), padded)
  np.testing.assert_array_equal(of_padded[0][:12], tokens[:12])
  np.testing.assert_array_equal(of_padded[1], np.where(np.arange(16) < 12, lengths, 0))
  numbers = batch | {"where": padded["where"].astype(int)}
  of_numbers = sample(variables, jax.random.key(0), numbers)
  jax.tree.map(np.testing.assert_array_equal, of_numbers, of_padded)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), batch["id"])
  np.testing.assert_array_equal(sample(variables, keys, batch)[0], tokens)
  assert (np.asarray(sample(variables, jax.random.key(1), batch)[0]) != tokens).any()
  assert jax.device_count() == 8
  np.testing.assert_array_equal(sample(variables, jax.random.key(0), split_rows(batch))[0], tokens)


def test_impossible_tokens_are_never_taken():
  variables = table(4)
  variables = variables._replace(params=variables.params.at[:, 2].set(-jnp.inf))
  for temperature in (0.0, 5.0):
    sample = jax.jit(sampler(steps_of(4), max_length=6, temperature=temperature))
    tokens, _ = sample(variables, jax.random.key(0), sources(16))
    assert set(np.unique(tokens)) == {END, 1, 3}


def test_program_is_compiled_once_for_each_length_of_the_source():
  traced = []

  def start(variables, batch, length):
    traced.append(batch["source"].shape)
    return {"hash": batch["source"].sum(-1)}

  variables = table(4)
  sample = jax.jit(sampler(steps_of(4)._replace(start=start), max_length=6, temperature=1.0))
  for seed, length in ((0, 3), (1, 3), (2, 5), (3, 5)):
    source = jnp.full((2, length), seed, jnp.int32)
    sample(variables, jax.random.key(seed), {"source": source})
  assert traced == [(2, 3), (2, 5)]


@pytest.mark.parametrize(
  "field, changes, options",
  [
    ("max_length", {}, {"max_length": 9}),
    ("max_length", {}, {"max_length": 0}),
    ("end_token", {"end_token": 4}, {}),
    ("end_token", {"end_token": -1}, {}),
    ("start_token", {"start_token": -1}, {}),
    ("temperature", {}, {"temperature": -1.0}),
    ("temperature", {}, {"temperature": float("nan")}),
  ],
)
def test_bad_arguments_are_refused_by_name(field, changes, options):
  with pytest.raises(ValueError, match=field):
    sampler(steps_of(4, **changes), **{"max_length": 4, **options})


def test_bad_calls_are_refused_by_name():
  with pytest.raises(ValueError, match="key"):
    sampler(steps_of(4), max_length=4, temperature=1.0)(table(4), None, sources(2))
  with pytest.raises(ValueError, match="vocab_size"):
    sampler(steps_of(4), max_length=4)(table(5), None, sources(2))
