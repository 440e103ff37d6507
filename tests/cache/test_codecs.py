"""Compares encoded columns with NumPy code that reads them by their description alone."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from distill_jax import losses
from distill_jax.cache import Dense, RandomSampling, TopK
from distill_jax.cache.codecs import bits, output_errors
from distill_jax.cache.codecs.codec import check_outputs, from_json, to_json
from distill_jax.cache.codecs.estimates import row_bytes

ALL = [Dense(d) for d in ("float32", "float16", "bfloat16", "int8")] + [
  TopK(3, 2.0, 6),
  RandomSampling(5, 0.5, 7),
]


def shaped(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def batch_of(rows, **more):
  return {"id": np.arange(rows), "view": np.zeros(rows, int), **more}


@functools.cache
def _jit_encode(codec):
  return jax.jit(codec.encode)


@functools.cache
def _jit_round_trip(codec):
  def round_trip(output, batch):
    columns = codec.encode(output, batch)
    return columns, codec.decode(columns, output)

  return jax.jit(round_trip)


def encode(codec, output, **more):
  """Returns the columns as a writer gets them: from a jit, on the host."""
  return jax.device_get(_jit_encode(codec)(jnp.asarray(output), batch_of(len(output), **more)))


def round_trip(codec, output, **more):
  """Returns the columns, on the host, and what they decode to."""
  return jax.device_get(_jit_round_trip(codec)(jnp.asarray(output), batch_of(len(output), **more)))


def read_bits(words, width, count):
  """Returns values of `width` bits, the least significant first."""
  raw = np.unpackbits(words.astype("<u4").view(np.uint8), axis=-1, bitorder="little")[
    ..., : width * count
  ]
  return raw.reshape(*words.shape[:-1], count, width).astype(np.int64) @ (
    1 << np.arange(width, dtype=np.int64)
  )


def read_top_k(columns, width, k, number_bits):
  """Decodes columns by the docstring of TopK, in float64."""
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


def test_packed_values_are_at_the_documented_bits(rng):
  values = {w: rng.integers(0, 2**w, (3, 2, 21)) for w in (1, 3, 8, 15, 17, 31, 32)}
  arrays = {width: jnp.asarray(x, jnp.uint32) for width, x in values.items()}

  @jax.jit
  def pack_and_unpack(arrays):
    words = {width: bits.pack(x, width) for width, x in arrays.items()}
    return words, {width: bits.unpack(x, width, 21) for width, x in words.items()}

  words, unpacked = jax.device_get(pack_and_unpack(arrays))
  for width, x in values.items():
    assert words[width].dtype == np.uint32
    assert words[width].shape == (3, 2, math.ceil(21 * width / 32))
    np.testing.assert_array_equal(read_bits(words[width], width, 21), x)
    np.testing.assert_array_equal(unpacked[width], x)


def test_bits_after_the_last_value_are_zero():
  assert int(bits.pack(jnp.full(3, 31, jnp.uint32), 5)[0]) == 2**15 - 1


@pytest.mark.parametrize(
  ("count", "width"), [(1, 1), (2, 1), (3, 2), (1024, 10), (1025, 11), (128_000, 17)]
)
def test_bit_width(count, width):
  assert bits.bit_width(count) == width


# all codecs


def test_columns_have_the_announced_layout_on_any_mesh(rng, mesh):
  shape = 16, 3, 9
  output = rng.normal(size=shape).astype(np.float32)

  @jax.jit
  def round_trips(output, batch):
    columns = [codec.encode(output, batch) for codec in ALL]
    return columns, [codec.decode(x, output) for codec, x in zip(ALL, columns)]

  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  batch = batch_of(16)
  single = round_trips(output, batch)
  sharded = round_trips(*jax.device_put((output, batch), rows))
  for codec, columns, decoded, sharded_columns in zip(ALL, *single, sharded[0]):
    layout = codec.columns(shaped(*shape))
    assert {name: (x.dtype, x.shape[1:]) for name, x in columns.items()} == layout
    for name, x in sharded_columns.items():
      assert len(x.sharding.device_set) == 8
      np.testing.assert_array_equal(x, columns[name])
    if isinstance(codec, Dense):
      assert decoded.shape == shape and decoded.dtype == jnp.float32
    else:
      assert decoded.indices.shape == (*shape[:-1], codec.k)
      assert decoded.log_tail.shape == shape[:-1]
      assert decoded.temperature == codec.temperature
      assert decoded.log_probs.dtype == decoded.log_tail.dtype == jnp.float32


@pytest.mark.parametrize("codec", [*ALL, Dense(size=(2, 3))], ids=str)
def test_a_codec_survives_json(codec):
  assert from_json(json.loads(json.dumps(to_json(codec)))) == codec


@pytest.mark.parametrize(
  ("values", "match"),
  [
    ({"name": "TopJ", "k": 1}, "codec.*'TopK'"),
    ({"name": "Dense"}, r"codec Dense: .*\['dtype', 'logits', 'size'\]"),
    ({"name": "Dense", "dtype": "float18", "logits": None, "size": None}, "dtype: .*'float16'"),
  ],
)
def test_unknown_json_is_rejected(values, match):
  with pytest.raises(ValueError, match=match):
    from_json(values)


@pytest.mark.parametrize(
  ("make", "match"),
  [
    (lambda: TopK(0), "k: .*got 0"),
    (lambda: RandomSampling(0), "k: .*got 0"),
    (lambda: TopK(2.5), "k: .*got 2.5"),
    (lambda: TopK(2, 0.0), "temperature: .*got 0"),
    (lambda: RandomSampling(2, math.inf), "temperature: .*got inf"),
    (lambda: TopK(2, bits=1), "bits: .*got 1"),
    (lambda: TopK(2, bits=17), "bits: .*got 17"),
    (lambda: RandomSampling(2, seed=-1), "seed: .*got -1"),
    (lambda: TopK(10).columns(shaped(4, 9)), r"k: .*1 to 9.*got 10"),
    (lambda: TopK(10).encode(jnp.zeros((4, 9)), {}), "k: .*1 to 9"),
    (lambda: TopK(1).columns(shaped(4)), r"output: .*2 axes.*float32 \(4,\)"),
    (lambda: Dense("int8").columns(shaped(4)), "output: .*2 axes"),
    (lambda: Dense().columns(shaped(4, 9, dtype=jnp.int32)), "output: .*int32"),
    (lambda: Dense().columns(shaped(4, 0)), "output: .*empty"),
    (lambda: RandomSampling(2).encode(jnp.zeros((4, 9)), {"id": jnp.arange(4)}), "batch: .*'view'"),
  ],
)
def test_fields_outside_their_range_are_rejected(make, match):
  with pytest.raises(ValueError, match=match):
    make()


# dense


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dense_floats_are_rounded_once(rng, dtype):
  for shape in ((6,), (6, 2, 3, 4)):
    x = (10 * rng.normal(size=shape)).astype(np.float32)
    x[0] = -np.inf
    columns, decoded = round_trip(Dense(dtype), x)
    expected = x.astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(columns["values"].view(expected.dtype), expected)
    np.testing.assert_array_equal(decoded, expected.astype(np.float32))


def test_int8_has_one_scale_per_row(rng):
  x = (rng.normal(size=(3, 4, 50)) * 10.0 ** rng.integers(-3, 4, (3, 4, 1))).astype(np.float32)
  x[0, 0], x[1, 1, :7], x[2, 2] = 0, -np.inf, -np.inf
  _, decoded = round_trip(Dense("int8", logits=False), x)
  np.testing.assert_array_equal(decoded == -np.inf, x == -np.inf)
  x, decoded = (np.where(x == -np.inf, 0, values) for values in (x, decoded))
  assert (np.abs(decoded - x) <= np.abs(x).max(-1, keepdims=True) / 254 * (1 + 1e-5)).all()


@pytest.mark.parametrize("padding", [-np.inf, np.finfo(np.float32).min, -1e9, -1e4, -100.0, 0.5])
def test_int8_logits_keep_the_softmax_next_to_a_padded_class(padding):
  x = np.array([[1.0, 1.5, padding], [1e6 + 1, 1e6, padding]], np.float32)
  for temperature in (1, 4, 20):
    codec = Dense("int8")
    check(codec, x)
    decoded = np.asarray(codec.decode(codec.encode(jnp.asarray(x), {}), x), np.float64)
    expected = scipy.special.softmax(x.astype(np.float64) / temperature, -1)
    got = scipy.special.softmax(decoded / temperature, -1)
    np.testing.assert_allclose(got, expected, atol=0.008)
    assert np.isfinite(decoded).all() == np.isfinite(padding)


def test_int8_logits_are_as_near_as_documented(rng):
  x = (rng.normal(size=(50, 40)) * 10.0 ** rng.uniform(-3, 1.5, (50, 1))).astype(np.float32)
  x[0] = 3.0
  codec = Dense("int8", logits=True)
  gaps, decoded = (z.max(-1, keepdims=True) - z for z in (x, codec.decode(codec.encode(x, {}), x)))
  widest = gaps.max(-1, keepdims=True)
  assert (np.abs(gaps - decoded) <= (np.sqrt(gaps * widest) + widest / 504) / 251 + 1e-5).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_logits_whose_softmax_would_change_are_refused(dtype):
  x = np.array([[30_000.0, 30_001, 29_999]], np.float32)
  features = Dense(dtype, logits=False)
  check(features, x)
  if dtype == "int8":  # It stores gaps.
    check(Dense(dtype), x)
    with pytest.raises(ValueError, match=r"outputs\['logits'\]: example id 30.*logits=True"):
      check(features, np.array([[1.0, 1.5, -1e9]], np.float32))
  else:
    with pytest.raises(ValueError, match=r"outputs\['logits'\]: example id 30"):
      check(Dense(dtype), x)


@pytest.mark.parametrize(
  ("name", "logits"), [("logits", True), ("0/logits", True), ("logits@a", True), ("hidden", False)]
)
def test_logits_are_known_by_name(name, logits):
  assert check_outputs({name: Dense("int8")}) == {name: Dense("int8", logits)}
  assert check_outputs({name: Dense("int8", False)})[name].logits is False


def test_dense_decodes_to_the_output_dtype(rng):
  x = jnp.asarray(rng.normal(size=(2, 3)), jnp.bfloat16)
  _, decoded = round_trip(Dense("float32"), x)
  assert decoded.dtype == jnp.bfloat16 and (decoded == x).all()


# top k


@pytest.mark.parametrize(
  ("shape", "k", "scale", "num_bits"),
  [
    ((40, 1000), 64, 4.0, 8),
    ((40, 100), 24, 4.0, 2),
    ((5, 4, 33), 33, 9.0, 16),
    ((6, 10), 1, 1.0, 8),
  ],
)
def test_top_k_stores_classes_probabilities_and_tail(rng, shape, k, scale, num_bits):
  logits = (scale * rng.normal(size=shape)).astype(np.float32)
  codec = TopK(k, 2.0, num_bits)
  columns, decoded = round_trip(codec, logits)
  _, order, log_probs, tail = exact_top_k(logits, k, 2.0)
  np.testing.assert_array_equal(decoded.indices, order)
  np.testing.assert_allclose(decoded.log_tail, tail, rtol=2e-6, atol=2e-6)
  spread = (log_probs[..., 0] - log_probs[..., -1])[..., None]
  max_error = np.vectorize(codec.max_error)(spread)
  assert (np.abs(decoded.log_probs - log_probs) <= max_error + 1e-5).all()
  mass = np.exp(np.asarray(decoded.log_probs, np.float64)).sum(-1)
  mass += np.exp(np.asarray(decoded.log_tail, np.float64))
  np.testing.assert_allclose(mass, 1, atol=2e-6)
  expected = read_top_k(columns, math.ceil(math.log2(shape[-1])), k, num_bits)
  for x, y in zip((decoded.indices, decoded.log_probs, decoded.log_tail), expected):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_max_error_has_the_documented_values():
  assert TopK(64, bits=8).max_error(10.0) == pytest.approx(0.0405, abs=5e-4)
  assert TopK(64, bits=16).max_error(10.0) < 1.6e-4


def test_missing_classes_have_probability_zero(rng):
  logits = rng.normal(size=(3, 6)).astype(np.float32)
  logits[:, 2:] = -np.inf
  _, decoded = round_trip(TopK(4), logits)
  np.testing.assert_allclose(np.exp(decoded.log_probs)[:, :2].sum(-1), 1, rtol=1e-6)
  assert (decoded.log_probs[:, 2:] == -np.inf).all() and (decoded.log_tail == -np.inf).all()


def test_small_mass_and_small_tail_are_exact():
  even = np.zeros((1, 20_000), np.float32)
  _, decoded = round_trip(TopK(2), even)
  np.testing.assert_allclose(decoded.log_probs, -math.log(20_000), rtol=1e-6)
  np.testing.assert_allclose(decoded.log_tail, math.log1p(-1e-4), rtol=1e-4)
  peaked = np.array([[0, -60, -90, -95, -300]], np.float32)
  _, decoded = round_trip(TopK(3), peaked)
  np.testing.assert_allclose(decoded.log_tail, -95, atol=1e-4)
  assert (np.abs(decoded.log_probs - peaked[:, :3]) < TopK(3).max_error(90.0)).all()


def test_classes_below_max_spread_are_stored_at_it():
  far = np.array([[0, -50, -5000, -6000]], np.float32)
  _, decoded = round_trip(TopK(3, bits=16), far)
  np.testing.assert_allclose(decoded.log_probs, [[0, -50, -100]], atol=0.01)


def test_label_log_prob_is_exact_or_marked(rng):
  logits = rng.normal(size=(4, 3, 7)).astype(np.float32)
  logits[1, 1, 2] = -np.inf
  label = np.array([[0, 1, 6], [3, 2, 0], [-1, -100, 7], [5, 5, 5]])
  stored = encode(TopK(2, 3.0), logits, label=label)["label_log_prob"]
  log_probs = exact_top_k(logits, 2, 3.0)[0]
  exact = np.take_along_axis(log_probs, label.clip(0, 6)[..., None], -1)[..., 0]
  is_class = (label >= 0) & (label < 7)
  np.testing.assert_allclose(stored[is_class], exact[is_class], rtol=1e-5, atol=1e-6)
  assert stored[1, 1] == -np.inf and (stored[~is_class] == 1).all()
  for other in ({}, {"label": np.zeros(4, int)}, {"label": np.full((4, 3), 0.5)}):
    assert (encode(TopK(2), logits, **other)["label_log_prob"] == 1).all()


def test_bytes_of_a_token_with_128_000_classes():
  logits = shaped(8, 512, 128_000)
  assert row_bytes(RandomSampling(12), logits) == 512 * 28
  assert row_bytes(TopK(64), logits) == 512 * 208


def test_half_precision_logits_are_encoded_as_float32(rng):
  logits = jnp.asarray(4 * rng.normal(size=(5, 40)), jnp.bfloat16)
  codecs = TopK(4, 3.0), RandomSampling(4, 3.0)

  @jax.jit
  def encode_both(logits, batch):
    wide = logits.astype(jnp.float32)
    return [(codec.encode(logits, batch), codec.encode(wide, batch)) for codec in codecs]

  for half, single in encode_both(logits, batch_of(5)):
    for name, x in half.items():
      np.testing.assert_array_equal(x, single[name])


def test_the_vocabulary_is_not_sorted():
  program = jax.jit(TopK(8).encode).lower(shaped(4, 1000), {}).compile().as_text()
  assert " sort(" not in program and "TopK" in program


# random samples


def sample(codec, logits, **batch):
  columns = _jit_encode(codec)(jnp.asarray(logits), batch_of(len(logits)) | batch)
  words = np.asarray(columns["indices"])
  return read_bits(words, bits.bit_width(logits.shape[-1]), codec.k)


def test_samples_follow_the_teacher_at_its_temperature(rng):
  classes = 41
  logits = (3 * rng.normal(size=classes)).astype(np.float32)
  logits[1] = -np.inf
  rows = sample(RandomSampling(100, 2.0), np.tile(logits, (200, 1)))
  counts = np.bincount(rows.ravel(), minlength=classes)
  expected = 20_000 * scipy.special.softmax(logits.astype(np.float64) / 2)
  assert counts.shape == expected.shape and not counts[expected == 0].any()
  assert scipy.stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_samples_are_a_function_of_seed_id_view_and_position(rng):
  logits = np.tile((2 * rng.normal(size=50)).astype(np.float32), (6, 3, 1))
  ids, views = np.array([4, 9, 4, 7, 9, 4]), np.array([0, 0, 1, 0, 0, 0])
  samples = sample(RandomSampling(12), logits, id=ids, view=views)
  np.testing.assert_array_equal(samples[[0, 1]], samples[[5, 4]])
  assert len({row.tobytes() for row in samples}) == 4
  assert len({position.tobytes() for position in samples[0]}) == 3
  order = np.array([3, 2, 5, 0, 1, 4])
  shuffled = sample(RandomSampling(12), logits, id=ids[order], view=views[order])
  np.testing.assert_array_equal(shuffled, samples[order])
  assert (sample(RandomSampling(12, seed=1), logits, id=ids, view=views) != samples).any()


def test_samples_have_equal_probabilities_and_no_tail():
  logits = np.array([[9.0, 0.0, 0.0]], np.float32)
  _, decoded = round_trip(RandomSampling(8), logits)
  np.testing.assert_array_equal(decoded.indices, 0)
  np.testing.assert_allclose(decoded.log_probs, -math.log(8), rtol=1e-6)
  assert (decoded.log_tail == -np.inf).all()


# errors


def check(codec, output):
  errors = np.asarray(_jit_errors(codec)(output))
  output_errors.check_errors("logits", errors, (30, 31, 32), (0, 2, 0))


@functools.cache
def _jit_errors(codec):
  return jax.jit(codec.errors)


@pytest.mark.parametrize("codec", ALL, ids=str)
def test_a_value_that_is_not_finite_names_the_example(rng, codec):
  output = rng.normal(size=(3, 2, 9)).astype(np.float32)
  output[..., 0] = -np.inf
  check(codec, output)
  for value in (np.nan, np.inf):
    output.reshape(3, -1)[1, -1] = value
    with pytest.raises(ValueError, match=r"outputs\['logits'\]: example id 31, view 2 .*NaN.*1 "):
      check(codec, output)


@pytest.mark.parametrize(
  ("dtype", "fits", "overflows"), [("float16", 65_504, 1e6), ("bfloat16", 3e38, 3.4e38)]
)
def test_an_overflow_names_the_example(dtype, fits, overflows):
  output = np.zeros((3, 4), np.float32)
  output[2, 0] = fits
  check(Dense(dtype), output)
  output[2, 0] = -overflows
  with pytest.raises(ValueError, match="example id 32, view 0 .*float32"):
    check(Dense(dtype), output)
  for wide in ("float32", "int8"):
    check(Dense(wide), output)


@pytest.mark.parametrize("codec", [TopK(1), RandomSampling(1)], ids=str)
def test_a_row_without_classes_names_the_example(codec):
  logits = np.zeros((3, 2, 4), np.float32)
  logits[0, 1] = -np.inf
  with pytest.raises(ValueError, match="example id 30, view 0 .*-inf"):
    check(codec, logits)
  logits[0, 0, 2] = np.nan
  with pytest.raises(ValueError, match="example id 30, view 0 .*NaN"):
    check(codec, logits)


def test_dense_stores_rows_without_classes():
  logits = np.full((3, 2, 4), -np.inf, np.float32)
  check(Dense(), logits)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_maps_are_stored_at_a_reduced_size(rng, dtype):
  maps = rng.normal(size=(2, 8, 12, 3)).astype(np.float32)
  codec = Dense(dtype, logits=True, size=(2, 3))
  columns, decoded = round_trip(codec, maps)
  small = losses.resize_logits(maps, (2, 3))
  plain, expected = round_trip(Dense(dtype, logits=True), small)
  jax.tree.map(np.testing.assert_array_equal, columns, plain)
  assert row_bytes(codec, maps) == row_bytes(Dense(dtype, logits=True), small)
  np.testing.assert_allclose(decoded, losses.resize_logits(expected, (8, 12)), atol=1e-6)


def test_a_reduced_size_keeps_classes_that_do_not_exist_and_finds_nan(rng):
  maps = rng.normal(size=(3, 4, 4, 2)).astype(np.float32)
  maps[0, ..., 1] = -np.inf
  maps[1, 3, 0, 1] = np.nan
  codec = Dense("float16", logits=True, size=(2, 2))
  np.testing.assert_array_equal(jax.jit(codec.errors)(maps), [0, 1, 0])
  _, decoded = round_trip(codec, maps[:1])
  assert (decoded[..., 1] == -np.inf).all() and np.isfinite(decoded[..., 0]).all()


@pytest.mark.parametrize(
  ("size", "shape", "field"),
  [
    ((8, 2), (2, 4, 4, 3), "size"),
    ((2, 2), (2, 4, 3), "output"),
    ((2, 2), (2, 4, 4, 4, 3), "output"),
    ((0, 2), (2, 4, 4, 3), "size"),
    (4, (2, 4, 4, 3), "size"),
    ((2, 2.5), (2, 4, 4, 3), "size"),
  ],
)
def test_a_size_that_does_not_fit_raises(size, shape, field):
  with pytest.raises(ValueError, match=f"^{field}: expected"):
    Dense(size=size).columns(shaped(*shape))
