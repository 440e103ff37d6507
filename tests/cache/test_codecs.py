"""Teacher outputs as columns and back, against NumPy that reads the columns by their description alone."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from distill_jax.cache.codecs import bits, faults
from distill_jax.cache.codecs.dense import Dense, RandomSampling, TopK, from_spec, spec

EVERY = [Dense(d) for d in ("float32", "float16", "bfloat16", "int8")] + [
  TopK(3, 2.0, 6),
  RandomSampling(5, 0.5, 7),
]


def shaped(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def batch_of(rows, **more):
  return {"id": np.arange(rows), "view": np.zeros(rows, int), **more}


def encoded(codec, output, **more):
  """The columns as a writer gets them: from a jit, on the host."""
  columns = jax.jit(codec.encode)(jnp.asarray(output), batch_of(len(output), **more))
  return {name: np.asarray(x) for name, x in columns.items()}


def decoded(codec, columns, output):
  return jax.jit(lambda c: codec.decode(c, shaped(*np.shape(output))))(columns)


def read_bits(words, width, count):
  """Values of `width` bits, the least significant first."""
  raw = np.unpackbits(words.astype("<u4").view(np.uint8), axis=-1, bitorder="little")[
    ..., : width * count
  ]
  return raw.reshape(*words.shape[:-1], count, width).astype(np.int64) @ (
    1 << np.arange(width, dtype=np.int64)
  )


def read_top_k(columns, width, k, number_bits):
  """What the docstring of TopK says, in float64."""
  top = 2**number_bits - 2
  codes = read_bits(columns["codes"], number_bits, k)
  below = -100 * (codes[..., :1] / top) ** 2 * codes / top
  below[codes > top] = -np.inf
  below[..., 0] = 0
  odds = columns["log_odds"].astype(np.float64)
  kept, left = scipy.special.log_expit(odds), scipy.special.log_expit(-odds)
  return (
    read_bits(columns["indices"], width, k),
    kept[..., None] + scipy.special.log_softmax(below, -1),
    left,
  )


def exact_top_k(logits, k, temperature=1.0):
  log_p = scipy.special.log_softmax(np.asarray(logits, np.float64) / temperature, -1)
  order = np.argsort(-log_p, -1, kind="stable")
  ranked = np.take_along_axis(log_p, order, -1)
  with np.errstate(divide="ignore"):
    tail = (
      scipy.special.logsumexp(ranked[..., k:], -1)
      if k < ranked.shape[-1]
      else np.full(ranked.shape[:-1], -np.inf)
    )
  return log_p, order[..., :k], ranked[..., :k], tail


# bits


@pytest.mark.parametrize("width", [1, 3, 8, 15, 17, 31, 32])
def test_packed_values_are_where_the_description_says(rng, width):
  values = rng.integers(0, 2**width, (3, 2, 21))
  words = bits.pack(jnp.asarray(values, jnp.uint32), width)
  assert words.dtype == jnp.uint32 and words.shape == (3, 2, math.ceil(21 * width / 32))
  np.testing.assert_array_equal(read_bits(np.asarray(words), width, 21), values)
  np.testing.assert_array_equal(bits.unpack(words, width, 21), values)


def test_bits_after_the_last_value_are_zero():
  assert int(bits.pack(jnp.full(3, 31, jnp.uint32), 5)[0]) == 2**15 - 1


@pytest.mark.parametrize(
  ("count", "width"), [(1, 1), (2, 1), (3, 2), (1024, 10), (1025, 11), (128_000, 17)]
)
def test_the_width_that_a_vocabulary_needs(count, width):
  assert bits.width_of(count) == width


# every codec


@pytest.mark.parametrize("shape", [(4, 9), (2, 3, 9)])
@pytest.mark.parametrize("codec", EVERY, ids=str)
def test_columns_are_as_announced_and_decode_to_the_shape_of_the_output(rng, codec, shape):
  output = rng.normal(size=shape).astype(np.float32)
  columns = encoded(codec, output)
  layout = codec.columns(shaped(*shape))
  assert {name: (x.dtype, x.shape[1:]) for name, x in columns.items()} == layout
  back = decoded(codec, columns, output)
  if isinstance(codec, Dense):
    assert back.shape == shape and back.dtype == jnp.float32
  else:
    assert back.indices.shape == (*shape[:-1], codec.k) and back.log_tail.shape == shape[:-1]
    assert back.temperature == codec.temperature
    assert back.log_probs.dtype == back.log_tail.dtype == jnp.float32


@pytest.mark.parametrize("codec", EVERY, ids=str)
def test_a_codec_survives_json(codec):
  assert from_spec(json.loads(json.dumps(spec(codec)))) == codec


def test_specs_that_are_no_codec_are_refused():
  with pytest.raises(ValueError, match="no 'TopJ'; did you mean 'TopK'"):
    from_spec({"codec": "TopJ", "k": 1})
  with pytest.raises(ValueError, match=r"Dense: expected the fields \['dtype'\], got \[\]"):
    from_spec({"codec": "Dense"})
  with pytest.raises(
    ValueError, match="dtype: 'float18' is none of those kept; did you mean 'float16'"
  ):
    from_spec({"codec": "Dense", "dtype": "float18"})


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: TopK(0), "k: expected an integer from 1 .* got 0; nearest is 1"),
    (lambda: RandomSampling(0), "k: expected an integer from 1 .* got 0"),
    (lambda: TopK(2.5), "k: expected an integer, got 2.5"),
    (lambda: TopK(2, 0.0), "temperature: expected a finite number > 0, got 0"),
    (lambda: RandomSampling(2, math.inf), "temperature: .* got inf"),
    (lambda: TopK(2, bits=1), "bits: expected an integer from 2 to 16, got 1; nearest is 2"),
    (lambda: TopK(2, bits=17), "nearest is 16"),
    (lambda: RandomSampling(2, seed=-1), "seed: .* got -1; nearest is 0"),
    (lambda: TopK(10).columns(shaped(4, 9)), r"k: expected 1 to 9, .*\(4, 9\), got 10"),
    (lambda: TopK(10).encode(jnp.zeros((4, 9)), {}), "k: expected 1 to 9"),
    (lambda: TopK(1).columns(shaped(4)), r"at least 2 axes.*float32 \(4,\)"),
    (lambda: Dense("int8").columns(shaped(4)), "at least 2 axes"),
    (lambda: Dense().columns(shaped(4, 9, dtype=jnp.int32)), "must be floating.*int32"),
    (
      lambda: RandomSampling(2).encode(jnp.zeros((4, 9)), {"id": jnp.arange(4)}),
      "the batch has no 'view'",
    ),
  ],
)
def test_what_no_codec_can_keep_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


# dense


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 2, 3, 4)])
def test_dense_floats_are_rounded_once(rng, dtype, shape):
  x = (10 * rng.normal(size=shape)).astype(np.float32)
  x[0] = -np.inf
  columns = encoded(Dense(dtype), x)
  expected = x.astype(jnp.dtype(dtype))
  np.testing.assert_array_equal(columns["values"].view(expected.dtype), expected)
  np.testing.assert_array_equal(decoded(Dense(dtype), columns, x), expected.astype(np.float32))


def test_int8_has_one_scale_for_each_row_of_the_last_axis(rng):
  x = (rng.normal(size=(3, 4, 50)) * 10.0 ** rng.integers(-3, 4, (3, 4, 1))).astype(np.float32)
  x[0, 0], x[1, 1, :7], x[2, 2] = 0, -np.inf, -np.inf
  back = np.asarray(decoded(Dense("int8"), encoded(Dense("int8"), x), x))
  np.testing.assert_array_equal(back == -np.inf, x == -np.inf)
  x, back = (np.where(x == -np.inf, 0, values) for values in (x, back))
  assert (np.abs(back - x) <= np.abs(x).max(-1, keepdims=True) / 254 * (1 + 1e-5)).all()


def test_a_dense_output_comes_back_in_its_own_dtype(rng):
  x = jnp.asarray(rng.normal(size=(2, 3)), jnp.bfloat16)
  back = Dense("float32").decode(encoded(Dense("float32"), x), x)
  assert back.dtype == jnp.bfloat16 and (back == x).all()


# top k


@pytest.mark.parametrize("number_bits", [2, 8, 16])
@pytest.mark.parametrize(
  ("shape", "k", "scale"), [((40, 1000), 64, 4.0), ((5, 4, 33), 33, 9.0), ((6, 10), 1, 1.0)]
)
def test_top_k_keeps_classes_order_masses_and_the_tail(rng, shape, k, scale, number_bits):
  logits = (scale * rng.normal(size=shape)).astype(np.float32)
  codec = TopK(k, 2.0, number_bits)
  columns = encoded(codec, logits)
  back = decoded(codec, columns, logits)
  _, order, log_probs, tail = exact_top_k(logits, k, 2.0)
  np.testing.assert_array_equal(back.indices, order)
  np.testing.assert_allclose(back.log_tail, tail, rtol=2e-6, atol=2e-6)
  spread = (log_probs[..., 0] - log_probs[..., -1])[..., None]
  largest = np.vectorize(codec.largest_error)(spread)
  assert (np.abs(back.log_probs - log_probs) <= largest + 1e-5).all()
  mass = np.exp(np.asarray(back.log_probs, np.float64)).sum(-1) + np.exp(
    np.asarray(back.log_tail, np.float64)
  )
  np.testing.assert_allclose(mass, 1, atol=2e-6)
  width = math.ceil(math.log2(shape[-1]))
  for ours, read in zip(
    (back.indices, back.log_probs, back.log_tail), read_top_k(columns, width, k, number_bits)
  ):
    np.testing.assert_allclose(ours, read, rtol=1e-5, atol=1e-5)


def test_the_largest_error_that_is_stated():
  assert TopK(64, bits=8).largest_error(10.0) == pytest.approx(0.0405, abs=5e-4)
  assert TopK(64, bits=16).largest_error(10.0) < 1.6e-4


def test_a_class_that_does_not_exist_has_probability_zero(rng):
  logits = rng.normal(size=(3, 6)).astype(np.float32)
  logits[:, 2:] = -np.inf
  back = decoded(TopK(4), encoded(TopK(4), logits), logits)
  np.testing.assert_allclose(np.exp(back.log_probs)[:, :2].sum(-1), 1, rtol=1e-6)
  assert (back.log_probs[:, 2:] == -np.inf).all() and (back.log_tail == -np.inf).all()


def test_a_small_kept_mass_and_a_small_tail_are_both_exact():
  even = np.zeros((1, 100_000), np.float32)
  back = decoded(TopK(2), encoded(TopK(2), even), even)
  np.testing.assert_allclose(back.log_probs, -math.log(100_000), rtol=1e-6)
  np.testing.assert_allclose(back.log_tail, math.log1p(-2e-5), rtol=1e-4)
  peaked = np.array([[0, -60, -90, -95, -300]], np.float32)
  back = decoded(TopK(3), encoded(TopK(3), peaked), peaked)
  np.testing.assert_allclose(back.log_tail, -95, atol=1e-4)
  assert (np.abs(back.log_probs - peaked[:, :3]) < TopK(3).largest_error(90.0)).all()


def test_what_lies_beyond_a_hundred_nats_is_kept_as_if_there():
  far = np.array([[0, -50, -5000, -6000]], np.float32)
  back = decoded(TopK(3, bits=16), encoded(TopK(3, bits=16), far), far)
  np.testing.assert_allclose(back.log_probs, [[0, -50, -100]], atol=0.01)


def test_the_label_has_its_log_probability_where_there_is_one(rng):
  logits = rng.normal(size=(4, 3, 7)).astype(np.float32)
  logits[1, 1, 2] = -np.inf
  label = np.array([[0, 1, 6], [3, 2, 0], [-1, -100, 7], [5, 5, 5]])
  kept = encoded(TopK(2, 3.0), logits, label=label)["label_log_prob"]
  exact = np.take_along_axis(exact_top_k(logits, 2, 3.0)[0], label.clip(0, 6)[..., None], -1)[
    ..., 0
  ]
  known = (label >= 0) & (label < 7)
  np.testing.assert_allclose(kept[known], exact[known], rtol=1e-5, atol=1e-6)
  assert kept[1, 1] == -np.inf and (kept[~known] == 1).all()
  for missing in ({}, {"label": np.zeros(4, int)}, {"label": np.full((4, 3), 0.5)}):
    assert (encoded(TopK(2), logits, **missing)["label_log_prob"] == 1).all()


def test_bytes_of_a_token_of_128_000_classes():
  logits = shaped(8, 512, 128_000)

  def token(codec):
    return (
      sum(dtype.itemsize * math.prod(shape) for dtype, shape in codec.columns(logits).values())
      / 512
    )

  assert token(RandomSampling(12)) == 28
  assert token(TopK(64)) == 208


def test_half_precision_logits_are_kept_as_their_float32(rng):
  logits = jnp.asarray(4 * rng.normal(size=(5, 40)), jnp.bfloat16)
  for codec in (TopK(4, 3.0), RandomSampling(4, 3.0)):
    for name, x in encoded(codec, logits).items():
      np.testing.assert_array_equal(x, encoded(codec, logits.astype(jnp.float32))[name])


def test_the_vocabulary_is_not_sorted():
  program = jax.jit(TopK(8).encode).lower(shaped(4, 1000), {}).compile().as_text()
  assert " sort(" not in program and "TopK" in program


# draws


def drawn(codec, logits, **batch):
  columns = jax.jit(codec.encode)(jnp.asarray(logits), batch_of(len(logits)) | batch)
  return np.asarray(codec.decode(columns, logits).indices)


@pytest.mark.parametrize("classes", [2, 41, 64])
def test_draws_come_from_the_teacher_at_its_temperature(rng, classes):
  logits = (3 * rng.normal(size=classes)).astype(np.float32)
  logits[1] = -np.inf if classes > 2 else logits[1]
  rows = drawn(RandomSampling(100, 2.0), np.tile(logits, (400, 1)))
  counts = np.bincount(rows.ravel(), minlength=classes)
  expected = 40_000 * scipy.special.softmax(logits.astype(np.float64) / 2)
  assert counts.shape == expected.shape and not counts[expected == 0].any()
  assert scipy.stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_draws_are_a_function_of_seed_id_view_and_position(rng):
  logits = np.tile((2 * rng.normal(size=50)).astype(np.float32), (6, 3, 1))
  ids, views = np.array([4, 9, 4, 7, 9, 4]), np.array([0, 0, 1, 0, 0, 0])
  draws = drawn(RandomSampling(12), logits, id=ids, view=views)
  np.testing.assert_array_equal(draws[[0, 1]], draws[[5, 4]])
  assert len({row.tobytes() for row in draws}) == 4
  assert len({position.tobytes() for position in draws[0]}) == 3
  np.testing.assert_array_equal(
    drawn(RandomSampling(12), logits[2:4], id=ids[2:4], view=views[2:4]), draws[2:4]
  )
  assert (drawn(RandomSampling(12, seed=1), logits, id=ids, view=views) != draws).any()


def test_draws_repeat_and_stand_for_the_whole_distribution():
  logits = np.array([[9.0, 0.0, 0.0]], np.float32)
  back = decoded(RandomSampling(8), encoded(RandomSampling(8), logits), logits)
  np.testing.assert_array_equal(back.indices, 0)
  np.testing.assert_allclose(back.log_probs, -math.log(8), rtol=1e-6)
  assert (back.log_tail == -np.inf).all()


@pytest.mark.parametrize("codec", EVERY, ids=str)
def test_eight_devices_keep_what_one_keeps(rng, mesh, codec):
  logits = rng.normal(size=(16, 9)).astype(np.float32)
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  many = jax.jit(codec.encode)(*jax.device_put((logits, batch_of(16)), rows))
  one = encoded(codec, logits)
  for name, x in many.items():
    assert len(x.sharding.device_set) == 8
    np.testing.assert_array_equal(x, one[name])


# faults


def fault(codec, output, ids=(30, 31, 32), num_views=(0, 2, 0)):
  faults.check("logits", np.asarray(jax.jit(codec.faults)(output)), ids, num_views)


@pytest.mark.parametrize("codec", EVERY, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [(3, 9), (3, 2, 9)])
def test_what_is_not_finite_names_the_example(rng, codec, bad, shape):
  output = rng.normal(size=shape).astype(np.float32)
  output[..., 0] = -np.inf
  fault(codec, output)
  output.reshape(3, -1)[1, -1] = bad
  with pytest.raises(
    ValueError, match=r"'logits' of example id 31, view 2 holds NaN or \+inf \(1 such rows of 3"
  ):
    fault(codec, output)


@pytest.mark.parametrize(
  ("dtype", "fits", "over"), [("float16", 65_504, 1e6), ("bfloat16", 3e38, 3.4e38)]
)
def test_an_overflow_names_the_example(dtype, fits, over):
  output = np.zeros((3, 4), np.float32)
  output[2, 0] = fits
  fault(Dense(dtype), output)
  output[2, 0] = -over
  with pytest.raises(
    ValueError, match="example id 32, view 0 holds a number that its codec's dtype does not"
  ):
    fault(Dense(dtype), output)
  for wide in ("float32", "int8"):
    fault(Dense(wide), output)


@pytest.mark.parametrize("codec", [TopK(1), RandomSampling(1)], ids=str)
def test_a_row_without_any_class_names_the_example(codec):
  logits = np.zeros((3, 2, 4), np.float32)
  logits[0, 1] = -np.inf
  with pytest.raises(
    ValueError, match="example id 30, view 0 has a row of logits that are all -inf"
  ):
    fault(codec, logits)
  fault(Dense(), logits)


def test_a_decoded_index_that_is_no_class_names_the_example():
  indices = np.array([[[0, 9]], [[8, 3]]])
  faults.check_indices("logits", indices, 10, [5, 6])
  with pytest.raises(
    ValueError, match="'logits' of example id 6 keeps class 8; the classes are 0 to 7"
  ):
    faults.check_indices("logits", indices % 9, 8, [5, 6])
  with pytest.raises(ValueError, match="example id 5 keeps class -1"):
    faults.check_indices("logits", indices - 1, 10, [5, 6])
