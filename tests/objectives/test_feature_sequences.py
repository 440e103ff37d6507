"""Feature sequences of different lengths: interpolation within the valid positions, and masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from terms_by_hand import shaped

from distill_jax import losses, reduce
from distill_jax.objectives import features, sequences
from distill_jax.objectives.sequences import resize_sequence

KEY = jax.random.key(0)
STUDENT, TEACHER = [3, 6, 1, 6, 0], [5, 4, 2, 7, 3]
ROWS = len(STUDENT)


def resized(x, length):
  """Half-pixel centers, in float64; with triangles as wide as a step where it shrinks."""
  scale = len(x) / length
  centers = np.clip((np.arange(length) + 0.5) * scale - 0.5, 0, len(x) - 1)
  if scale <= 1:
    columns = [np.interp(centers, np.arange(len(x)), column) for column in np.float64(x).T]
    return np.stack(columns, 1)
  weights = np.maximum(1 - np.abs(centers[:, None] - np.arange(len(x))) / scale, 0)
  return weights / weights.sum(1, keepdims=True) @ np.float64(x)


def networks(rng, fill, channels=(4, 4)):
  """Outputs with a value in the padding."""
  outputs = []
  for name, size, counts, width in (
    ("block1", 6, STUDENT, channels[0]),
    ("block2", 7, TEACHER, channels[1]),
  ):
    x = rng.normal(size=(ROWS, size, width)).astype(np.float32)
    is_valid = np.arange(size) < np.array(counts)[:, None]
    outputs.append({name: np.where(is_valid[..., None], x, np.float32(fill))})
  return outputs


def segments(counts, size):
  return np.where(np.arange(size) < np.array(counts)[:, None], 0, -1)


def evaluate(term, student, teacher, batch):
  variables = term.init(KEY, student, teacher)

  @jax.jit
  @jax.value_and_grad
  def mean(student):
    value, _ = term.apply(*variables, student, teacher, batch, step=0, key=KEY)
    return reduce.mean(*value)

  return mean(student), variables.params


@pytest.mark.parametrize("width", [4, 3])
def test_valid_positions_are_interpolated_and_compared(rng, width):
  """Rows that grow and shrink, one position, and none of the student; padding may be NaN."""
  batch = {"n": np.array(STUDENT), "t_segments": segments(TEACHER, 7)}
  batch["where"] = np.array([True, True, True, False, True])
  term = sequences("block1", "block2", losses.hint, lengths=("n", "t_segments"))
  state = rng.bit_generator.state
  results = []
  for fill in (np.nan, 7.0):
    rng.bit_generator.state = state
    student, teacher = networks(rng, fill, (width, 4))
    ((value, grads), params) = evaluate(term, student, teacher, batch)
    results.append((value, grads))
  jax.tree.map(np.testing.assert_array_equal, *results)
  assert np.isfinite(grads["block1"]).all() and np.abs(grads["block1"]).max() > 0
  assert bool(params) == (width != 4)
  values = []
  for b in range(3):
    s = resized(student["block1"][b, : STUDENT[b]], TEACHER[b])
    s = s @ np.float64(params["kernel"]) + params["bias"] if params else s
    values += list(((s - teacher["block2"][b, : TEACHER[b]]) ** 2).mean(1))
  np.testing.assert_allclose(value, np.mean(values), rtol=1e-5)


def test_full_rows_are_resized_as_images_are(rng):
  x = jnp.asarray(rng.normal(size=(2, 6, 3)), jnp.float32)
  for length in (3, 4, 6, 9):
    full = (jnp.full(2, n) for n in (6, length))
    expected = jax.image.resize(x, (2, length, 3), "linear")
    np.testing.assert_allclose(resize_sequence(x, *full, length), expected, rtol=1e-5, atol=1e-6)


def test_lengths_are_outputs_entries_or_none(rng):
  student, teacher = networks(rng, 0.0)
  masks = (
    student | {"mask": segments(STUDENT, 6) >= 0},
    teacher | {"mask": segments(TEACHER, 7) >= 0},
  )
  one_name = sequences("block1", "block2", losses.cosine, lengths="mask")
  entries = sequences("block1", "block2", losses.cosine, lengths=("s", "t"))
  expected = evaluate(entries, student, teacher, {"s": np.array(STUDENT), "t": np.array(TEACHER)})
  term = one_name.apply({}, {}, *masks, {}, step=0, key=KEY)[0]
  np.testing.assert_allclose(reduce.mean(*term), expected[0][0], rtol=1e-5)
  unpadded = sequences("block1", "block2", losses.cosine, lengths=None)
  full = {"s": np.full(ROWS, 6), "t": np.full(ROWS, 7)}
  everything = [evaluate(term, student, teacher, full)[0][0] for term in (unpadded, entries)]
  assert everything[0] == everything[1] != expected[0][0]


@pytest.mark.parametrize(
  ("term", "field"),
  [
    (sequences("block1", "vector", losses.hint, lengths=None), "vector: .*teacher"),
    (features("block1", "block2", losses.hint), ".*sequences"),
  ],
)
def test_other_outputs_raise_in_init(term, field):
  outputs = shaped(block1=(2, 5, 6)), shaped(block2=(2, 4, 6), vector=(2, 6))
  with pytest.raises(ValueError, match=f"^{field}"):
    term.init(KEY, *outputs)


@pytest.mark.parametrize(
  ("lengths", "field"),
  [
    (("s", "s"), "lengths: .*'s'"),
    (("s", "x"), "x: "),
    (("f", "t"), "lengths: .*float"),
    (("b", "t"), "lengths: .*bool"),
  ],
)
def test_other_lengths_raise(rng, lengths, field):
  batch = {"s": segments(STUDENT, 6), "t": segments(TEACHER, 7)}
  batch |= {"f": np.ones(ROWS), "b": np.ones(ROWS, bool)}
  term = sequences("block1", "block2", losses.hint, lengths=lengths)
  with pytest.raises(ValueError, match=f"^{field}"):
    term.apply({}, {}, *networks(rng, 0.0), batch, step=0, key=KEY)


def test_lengths_of_three_names_raise_at_once():
  with pytest.raises(ValueError, match="^lengths"):
    sequences("block1", "block2", losses.hint, lengths=("a", "b", "c"))
