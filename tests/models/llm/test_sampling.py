"""Tests sampling: greedy and random tokens, ends of rows, and one compilation a length bucket."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_decoder import VOCAB_SIZE, compiled, make, merge, random_params

from distill_jax.models.llm import sampling
from distill_jax.models.llm.head import head_logits
from distill_jax.models.llm.sampling import Generator, generate

PARAMS = random_params()


@pytest.fixture(scope="module")
def generator():
  return Generator(make())


def test_greedy_takes_the_most_probable_token(rng, generator):
  prompts = [list(map(int, rng.integers(0, VOCAB_SIZE, n))) for n in (3, 7)]
  texts = generator(PARAMS, prompts, 5)
  assert [len(text) for text in texts] == [8, 12]
  rows = np.stack([np.pad(text, (0, 12 - len(text))) for text in texts])
  best = head_logits(compiled()(PARAMS, rows)).argmax(-1)
  for prompt, text, row in zip(prompts, texts, best):
    assert text[: len(prompt)] == prompt
    np.testing.assert_array_equal(text[len(prompt) :], row[len(prompt) - 1 : len(text) - 1])


def test_each_length_bucket_is_compiled_once(monkeypatch):
  shapes = []

  def counted(decoder, tokens, *arguments, **options):
    # Runs while a program is traced, hence once for each.
    shapes.append(tokens.shape)
    assert options["stop_token"] == 4
    return tokens, arguments[0]

  monkeypatch.setattr(sampling, "generate", counted)
  generator = Generator(make(), stop_token=4)
  for length, new, temperature in [(3, 5, 0.0), (9, 2, 1.0), (20, 12, 0.5), (1, 31, 0.0)]:
    key = jax.random.key(length)
    generator(PARAMS, [[1] * length] * 2, new, temperature=temperature, key=key)
  assert shapes == [(2, 32)]
  generator(PARAMS, [[1] * 30] * 2, 4)
  generator(PARAMS, [[1] * 60] * 2, 4)
  assert shapes == [(2, 32), (2, 64)]


def test_samples_have_the_probabilities_of_the_model():
  rows = 4000
  decoder = merge(PARAMS)
  tokens = jnp.broadcast_to(jnp.array([5, 2, 0]), (rows, 3))
  run = jax.jit(
    lambda key: generate(decoder, tokens, jnp.full(rows, 2), 1, temperature=2.0, key=key)
  )
  samples, _ = run(jax.random.key(0))
  frequencies = np.bincount(samples[:, 2], minlength=VOCAB_SIZE) / rows
  z = head_logits(compiled()(PARAMS, np.array([[5, 2] + [0] * 10])))[0, 1]
  np.testing.assert_allclose(frequencies, jax.nn.softmax(z / 2), atol=4 * np.sqrt(0.25 / rows))


def test_rows_end_after_the_stop_token_and_when_they_are_full():
  tokens = jnp.zeros((3, 16), int).at[:, :2].set(jnp.array([[1, 2], [3, 0], [7, 7]]))
  tokens = tokens.at[2].set(7)
  prompts = jnp.array([2, 1, 16])
  decoder = merge(PARAMS)

  def run(stop_token):
    program = jax.jit(lambda t, n: generate(decoder, t, n, 99, stop_token=stop_token))
    return map(np.asarray, program(tokens, prompts))

  free, lengths = run(None)
  np.testing.assert_array_equal(lengths, 16)
  np.testing.assert_array_equal(free[2], 7)
  stop = int(free[0, 6])
  texts, lengths = run(stop)
  for text, length, longer, prompt in zip(texts, lengths, free, prompts):
    ends = np.flatnonzero(longer[prompt:] == stop)
    expected = int(prompt + ends[0] + 1) if ends.size else 16
    assert length == expected
    np.testing.assert_array_equal(text[:length], longer[:length])
    assert not text[length:].any()


@pytest.mark.parametrize(
  "prompts, new, options, field",
  [
    ([], 1, {}, "prompts"),
    ([[1], []], 1, {}, "prompts"),
    ([[1]], 0, {}, "max_new_tokens"),
    ([[1, 19]], 1, {}, "prompts: .*vocab_size=19, got 19"),
    ([[1] * 60], 5, {}, "max_new_tokens: .*max_length=64"),
    ([[1]], 1, {"temperature": 1.0}, "temperature"),
    ([[1]], 1, {"temperature": -1.0}, "temperature"),
  ],
)
def test_invalid_prompts_raise(prompts, new, options, field, generator):
  with pytest.raises(ValueError, match=rf"^{field}"):
    generator({}, prompts, new, **options)
