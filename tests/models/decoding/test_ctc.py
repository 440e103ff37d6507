"""Greedy CTC and prefix beams equal exhaustive search, and ctc-beam-decoder."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.models import from_apply
from distill_jax.models.decoding import ctc_beam_search, ctc_greedy, ctc_nbest, ctc_sampler


def collapse(path, blank):
  return tuple(int(token) for token, _ in itertools.groupby(path) if token != blank)


def exhaustive(probabilities, blank):
  """Returns [(tokens, probability)] of all sequences that have one, most probable first."""
  sums = {}
  for path in itertools.product(range(probabilities.shape[1]), repeat=len(probabilities)):
    key = collapse(path, blank)
    value = np.prod([probabilities[i, token] for i, token in enumerate(path)])
    sums[key] = sums.get(key, 0) + value
  return sorted(((k, v) for k, v in sums.items() if v > 0), key=lambda x: -x[1])


def sequences(beams, row):
  """Returns [(tokens, log-probability)] of a row of `Beams`."""
  rows = zip(*(np.asarray(x[row]) for x in beams))
  return [(tuple(t[:n].tolist()), score) for t, n, score in rows if np.isfinite(score)]


@pytest.mark.parametrize("classes, frames, blank", [(3, 5, 0), (4, 4, 2)])
def test_wide_beam_is_exhaustive_search(classes, frames, blank):
  probabilities = np.random.default_rng(0).dirichlet(np.full(classes, 0.7), (4, frames))
  probabilities[3, 1:3, 1] = 0  # -inf of logits; the log-softmax sums what is left
  probabilities /= probabilities.sum(-1, keepdims=True)
  lengths = np.array([frames, frames - 2, 0, frames + 7])
  with np.errstate(divide="ignore"):
    logits = np.log(probabilities)
  search = jax.jit(lambda *args: ctc_beam_search(*args, beam_size=60, blank=blank))
  beams = search(logits, lengths)
  for row, length in enumerate(lengths):
    expected = exhaustive(probabilities[row, :length], blank)[:60]
    assert [tokens for tokens, _ in sequences(beams, row)] == [tokens for tokens, _ in expected]
    scores = [score for _, score in sequences(beams, row)]
    np.testing.assert_allclose(np.exp(scores), [value for _, value in expected], atol=1e-6)
    behind = np.arange(frames) >= np.asarray(beams.lengths)[row, :, None]
    assert (np.asarray(beams.tokens)[row][behind] == blank).all()


def hannun(probabilities, width):
  """Returns [(tokens, log-probability)], from a dictionary of prefixes; class 0 is the blank."""
  beams = {(): (1.0, 0.0)}  # probabilities of paths that end with the blank, and that do not
  for frame in probabilities:
    new = {}
    for prefix, (blank, token) in beams.items():
      both = new.setdefault(prefix, [0.0, 0.0])
      both[0] += (blank + token) * frame[0]
      for c in range(1, len(frame)):
        again = prefix[-1:] == (c,)
        new.setdefault((*prefix, c), [0.0, 0.0])[1] += (blank + token * (not again)) * frame[c]
        both[1] += token * again * frame[c]
    beams = dict(sorted(new.items(), key=lambda x: -sum(x[1]))[:width])
  return [(prefix, np.log(sum(pair))) for prefix, pair in beams.items()]


def test_beams_are_those_of_references():
  p = np.random.default_rng(5).dirichlet(np.full(4, 0.6), 12)
  for width in (3, 300):
    beams = sequences(ctc_beam_search(jnp.log(p)[None], beam_size=width), 0)
    expected = hannun(p, width)
    assert [tokens for tokens, _ in beams][:8] == [tokens for tokens, _ in expected][:8]
    np.testing.assert_allclose([x for _, x in beams], [x for _, x in expected], atol=2e-5)
  # ctc-beam-decoder 0.2.0: build_ctcdecoder(["", "a", "b", "c"]).decode_beams(np.log(p),
  # beam_width=1000, beam_prune_logp=-100, token_min_logp=-100); it prunes narrow beams otherwise.
  golden = {
    "acacb": -3.51792,
    "acaccb": -3.52652,
    "accb": -3.56274,
    "acacab": -3.63262,
    "acab": -3.71311,
  }
  assert ["".join(" abc"[i] for i in tokens) for tokens, _ in beams[:5]] == list(golden)
  np.testing.assert_allclose([x for _, x in beams[:5]], list(golden.values()), atol=2e-5)


def test_greedy_collapses_the_most_probable_path():
  rng = np.random.default_rng(1)
  path = rng.integers(0, 3, (20, 9))
  path[:2] = [[1], [2]]  # only the blank; one token, again and again
  lengths = rng.integers(0, 13, 20)
  lengths[:3] = 9, 9, 0
  tokens, counts = jax.jit(lambda *x: ctc_greedy(*x, blank=1))(jax.nn.one_hot(path, 3), lengths)
  for row in range(20):
    expected = collapse(path[row, : lengths[row]], 1)
    assert tuple(tokens[row, : counts[row]].tolist()) == expected
    assert (tokens[row, counts[row] :] == 1).all()
  assert counts[:3].tolist() == [0, 1, 0]


def test_samplers_mask_padding_and_all_frames_are_valid_without_lengths():
  def apply(w, x):
    return {"logits": w * jax.nn.one_hot(x, 3)}

  model = from_apply(None, apply, variables=jnp.float32(9), inputs="x")
  batch = {"x": jnp.array([[1, 1, 0, 1], [2, 2, 2, 2]]), "where": jnp.array([True, False])}
  for beam_size in (None, 4):
    sample = jax.jit(ctc_sampler(model, beam_size=beam_size))
    tokens, lengths = sample(model.variables, None, batch)
    assert tokens.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]] and lengths.tolist() == [2, 0]
  beams = ctc_nbest(model, beam_size=4)(model.variables, batch)
  assert beams.tokens.shape == (2, 4, 4) and sequences(beams, 1) == [((), 0.0)]


@pytest.mark.parametrize(
  "field, call",
  [
    ("blank", lambda: ctc_greedy(jnp.zeros((1, 2, 3)), blank=3)),
    ("blank", lambda: ctc_beam_search(jnp.zeros((1, 2, 3)), beam_size=2, blank=-1)),
    ("logits", lambda: ctc_greedy(jnp.zeros((2, 3)))),
    ("logits", lambda: ctc_beam_search(jnp.zeros((2, 3)), beam_size=2)),
    ("beam_size", lambda: ctc_sampler(None, beam_size=0)),
    ("lengths", lambda: ctc_greedy(jnp.zeros((2, 3, 4)), jnp.ones((2, 1), int))),
    ("lengths", lambda: ctc_greedy(jnp.zeros((2, 3, 4)), jnp.ones(2, bool))),
    ("lengths", lambda: ctc_beam_search(jnp.zeros((2, 3, 4)), [1.0, 2.0], beam_size=2)),
    ("logits", lambda: _hidden_only()),
  ],
)
def test_errors(field, call):
  with pytest.raises(ValueError, match=field):
    call()


def _hidden_only():
  model = from_apply(None, lambda w, x: {"hidden": w * x}, variables=1.0, inputs="x")
  return ctc_sampler(model)(model.variables, None, {"x": jnp.zeros((1, 2))})


def test_numbers_of_frames_may_stand_in_the_batch():
  model = from_apply(None, lambda w, x: w * jax.nn.one_hot(x, 3), variables=9.0, inputs="x")
  batch = {"x": jnp.array([[1, 2, 1]]), "lengths": jnp.array([2])}
  for beam_size in (None, 2):
    tokens, lengths = ctc_sampler(model, beam_size=beam_size)(model.variables, None, batch)
    assert tokens[0].tolist() == [1, 2, 0] and lengths.tolist() == [2]
