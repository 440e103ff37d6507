"""Wide beams equal exhaustive search, and narrow ones a reference in numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_steps import END, hashed, log_probs, sources, split_rows, steps_of, table

from distill_jax.models.decoding import beam_sampler, beam_search, sampler


def score(variables, source, tokens, penalty):
  """Returns the score of a sequence of tokens, which may end with the end token."""
  sums = sum(log_probs(variables, source, tokens[:i])[x] for i, x in enumerate(tokens))
  return sums / len(tokens) ** penalty


def exhaustive(variables, source, vocab_size, max_length, penalty):
  """Returns (score, tokens with the end token) of all sequences, best first."""
  sequences = []
  for length in range(max_length + 1):
    for prefix in itertools.product(range(1, vocab_size), repeat=length):
      sequences.append(prefix if length == max_length else (*prefix, END))
  return sorted(((score(variables, source, x, penalty), x) for x in sequences), reverse=True)


def reference(variables, source, max_length, beam_size, penalty):
  """Returns (score, tokens with the end token), best first, from lists of hypotheses."""
  live, ended, done = [(0.0, ())], [], False
  for length in range(1, max_length + 1):
    if done:
      break
    candidates = [
      (total + value, (*tokens, token))
      for total, tokens in live
      for token, value in enumerate(log_probs(variables, source, tokens))
      if np.isfinite(value)
    ]
    candidates = sorted(candidates, key=lambda x: -x[0])[: 2 * beam_size]
    ends = [tokens[-1] == END or length == max_length for _, tokens in candidates]
    ended += [
      (s / length**penalty, x) for (s, x), end in list(zip(candidates, ends))[:beam_size] if end
    ]
    ended = sorted(ended, key=lambda x: -x[0])[:beam_size]
    live = [x for x, end in zip(candidates, ends) if not end][:beam_size]
    best = live[0][0] / length**penalty if live else -np.inf
    done = not live or (len(ended) == beam_size and best <= ended[-1][0])
  return ended


def hypotheses(beams, row, max_length):
  """Returns (score, tokens with the end token) of a row of `Beams`."""
  found = []
  for tokens, length, value in zip(*(np.asarray(x[row]) for x in beams)):
    if np.isfinite(value):
      assert (tokens[length:] == END).all() and (tokens[:length] != END).all()
      found.append((value, tuple(tokens[: min(length + 1, max_length)].tolist())))
  return found


def assert_same(found, expected):
  assert [tokens for _, tokens in found] == [tokens for _, tokens in expected]
  np.testing.assert_allclose([s for s, _ in found], [s for s, _ in expected], rtol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_wide_beams_equal_exhaustive_search(penalty):
  variables, batch = table(3, scale=1.0), sources(4)
  search = beam_search(steps_of(3), max_length=4, beam_size=31, length_penalty=penalty)
  beams = jax.jit(search)(variables, batch)
  for row, source in enumerate(np.asarray(batch["source"])):
    expected = exhaustive(variables, source, 3, 4, penalty)
    assert len(expected) == 31
    assert_same(hypotheses(beams, row, 4), expected)


@functools.cache
def search_of(beam_size, penalty):
  return jax.jit(
    beam_search(steps_of(5), max_length=7, beam_size=beam_size, length_penalty=penalty)
  )


@pytest.mark.parametrize("beam_size, penalty", [(2, 0.0), (3, 1.0), (7, 0.6)])
def test_narrow_beams_equal_reference(beam_size, penalty):
  variables, batch = table(5), sources(24)
  variables = variables._replace(params=variables.params.at[::3, 2].set(-jnp.inf))
  beams = search_of(beam_size, penalty)(variables, batch)
  lengths = set()
  for row, source in enumerate(np.asarray(batch["source"])):
    expected = reference(variables, source, 7, beam_size, penalty)
    assert_same(hypotheses(beams, row, 7), expected)
    lengths |= {len(tokens) for _, tokens in expected}
  assert lengths > {1, 7}


def test_one_beam_is_greedy_and_the_sampler_returns_the_best():
  variables, batch = table(5), sources(24)
  greedy = jax.jit(sampler(steps_of(5), max_length=7))(variables, None, batch)
  beams = search_of(1, 1.0)(variables, batch)
  np.testing.assert_array_equal(beams.tokens[:, 0], greedy[0])
  np.testing.assert_array_equal(beams.lengths[:, 0], greedy[1])
  best = search_of(3, 1.0)(variables, batch)
  sample = jax.jit(beam_sampler(steps_of(5), max_length=7, beam_size=3))
  tokens, lengths = sample(variables, None, batch)
  np.testing.assert_array_equal(tokens, best.tokens[:, 0])
  np.testing.assert_array_equal(lengths, best.lengths[:, 0])


def test_beams_of_a_row_depend_on_no_other_row_and_no_device():
  variables, batch = table(5), sources(24)
  beams = search_of(3, 1.0)(variables, batch)
  order = np.random.default_rng(0).permutation(24)
  moved = search_of(3, 1.0)(variables, {name: x[order] for name, x in batch.items()})
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[order]), moved, beams)
  assert jax.device_count() == 8
  split = search_of(3, 1.0)(variables, split_rows(batch))
  jax.tree.map(np.testing.assert_array_equal, split, beams)
  where = jnp.arange(24) < 20
  padded = search_of(3, 1.0)(variables, batch | {"where": where})
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:20], y[:20]), padded, beams)
  assert (padded.lengths[20:] == 0).all() and np.isneginf(padded.scores[20:]).all()
  assert (padded.tokens[20:] == END).all()


@functools.cache
def search_of_four():
  """Returns a search whose beam is wider than its vocabulary of four tokens."""
  return jax.jit(beam_search(steps_of(4), max_length=5, beam_size=6))


def test_sequences_that_never_end_have_the_full_length():
  variables = table(4)
  variables = variables._replace(params=variables.params.at[:, END].set(-jnp.inf))
  beams = search_of_four()(variables, sources(2))
  assert (beams.lengths == 5).all() and (beams.tokens != END).all()
  assert np.isfinite(beams.scores).all()


def test_a_beam_without_continuations_has_no_more_sequences():
  variables = table(4)
  variables = variables._replace(params=variables.params.at[:, 1:].set(-jnp.inf))
  beams = search_of_four()(variables, sources(2))
  np.testing.assert_array_equal(beams.scores, [[0, *[-np.inf] * 5]] * 2)
  assert (beams.lengths == 0).all() and (beams.tokens == END).all()
  nothing = variables._replace(params=jnp.full_like(variables.params, -jnp.inf))
  beams = search_of_four()(nothing, sources(2))
  assert np.isneginf(beams.scores).all()


def test_equal_scores_come_in_the_order_of_end_beam_and_token():
  variables = table(4)._replace(params=jnp.zeros((97, 4)))
  search = jax.jit(beam_search(steps_of(4), max_length=2, beam_size=4))
  beams = search(variables, sources(1))
  assert hypotheses(beams, 0, 2) == [
    (pytest.approx(-np.log(4)), tokens) for tokens in [(0,), (1, 0), (1, 1), (1, 2)]
  ]


def test_search_is_compiled_once_for_each_length_and_moves_only_what_changes():
  traced = []

  def start(variables, batch, length):
    traced.append(batch["source"].shape)
    state = batch["source"].sum(-1)
    return {"hash": state, "encoded": jnp.ones((len(state), 17)) * state[:, None]}

  def step(variables, tokens, position, cache):
    state = hashed(cache["hash"], tokens, len(variables.params))
    return variables.params[state] + 0 * cache["encoded"][:, :4], cache | {"hash": state}

  steps = steps_of(4)._replace(start=start, step=step)
  variables = table(4)
  search = jax.jit(beam_search(steps, max_length=6, beam_size=3))
  for seed, length in ((0, 3), (1, 3), (2, 5), (3, 5)):
    search(variables, {"source": jnp.full((2, length), seed, jnp.int32)})
  assert traced == [(2, 3), (2, 5)]
  program = str(jax.make_jaxpr(search)(variables, {"source": jnp.ones((2, 3), jnp.int32)}))
  # Keys and values of the source are repeated for the beams, once.
  assert program.count(":f32[2,3,17] = ") == 1


@pytest.mark.parametrize(
  "field, options",
  [
    ("beam_size", {"beam_size": 0}),
    ("max_length", {"max_length": 9}),
    ("length_penalty", {"length_penalty": float("nan")}),
  ],
)
def test_bad_arguments_of_beams_are_refused_by_name(field, options):
  for function in (beam_search, beam_sampler):
    with pytest.raises(ValueError, match=field):
      function(steps_of(4), **{"max_length": 4, "beam_size": 2, **options})
