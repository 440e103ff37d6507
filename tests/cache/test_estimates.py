"""Compares estimates of codecs with float64 NumPy, and the biases of top k and random samples."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from distill_jax import losses
from distill_jax.cache import Dense, RandomSampling, TopK, estimate
from distill_jax.cache.codecs import estimates
from distill_jax.cache.codecs.estimates import default_codecs, estimate_table, row_bytes, top_k_mass

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
CODECS = [Dense("int8"), TopK(5, 2.0, bits=16), RandomSampling(12)]
TEMPERATURE = 4.0


@pytest.fixture(scope="module")
def logits():
  """Logits of a teacher and a student."""
  return (3 * np.random.default_rng(0).normal(size=(2, 40, 100))).astype(np.float32)


@pytest.fixture(scope="module")
def measured(logits):
  return estimate(*logits, codecs=CODECS, temperature=TEMPERATURE)


def cosine(a, b):
  return (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize(("shape", "k"), [((8, 5, 100), 4), ((40, 100), 100)])
def test_top_k_mass_and_its_fifth_percentile(logits, shape, k):
  p = -np.sort(-softmax(logits[0].astype(np.float64) / 2, -1), -1)
  mass = p[:, :k].sum(-1)
  result = top_k_mass(logits[0].reshape(shape), k, temperature=2.0)
  np.testing.assert_allclose(result, (mass.mean(), np.percentile(mass, 5)), rtol=1e-5)


def test_row_bytes():
  output = jax.ShapeDtypeStruct((7, 3, 100), jnp.float32)
  sizes = {
    Dense("float16"): 600,
    Dense("int8"): 300 + 24,
    Dense("int8", logits=False): 300 + 12,
    TopK(4): 3 * (4 + 4 + 8),
    RandomSampling(12): 3 * 12,
  }
  assert {codec: row_bytes(codec, output) for codec in sizes} == sizes


def test_cosines_are_those_of_the_gradients_at_the_student(measured, logits):
  t, s = logits.astype(np.float64)
  p, q = softmax(t / 2, -1), softmax(s / 2, -1)
  stored = np.argsort(-p, -1)[:, :5]
  inside = np.zeros_like(p, bool)
  np.put_along_axis(inside, stored, True, -1)
  conditional = np.where(inside, q, 0) / (q * inside).sum(-1, keepdims=True)
  conditional -= np.where(inside, p, 0) / (p * inside).sum(-1, keepdims=True)
  others, tail = q * ~inside, (p * ~inside).sum(-1, keepdims=True)
  bucket = np.where(inside, q - p, others * (1 - tail / others.sum(-1, keepdims=True)))
  smoothed = q - np.where(inside, p, tail / 95)
  expected = {
    "sparse_kl": bucket,
    "sparse_kl_conditional": conditional,
    "sparse_kl_smoothed": smoothed,
  }
  assert measured[1].cosines == pytest.approx(
    {name: cosine(x, q - p) for name, x in expected.items()}, abs=1e-4
  )


def test_dense_codecs_are_measured_at_the_temperature(measured, logits):
  t, s = logits
  scale = np.abs(t).max(-1, keepdims=True) / 127
  stored = np.round(t / scale) * scale
  p, q, stored_p = (softmax(z.astype(np.float64) / TEMPERATURE, -1) for z in (t, s, stored))
  expected = cosine(q - stored_p, q - p)
  assert measured[0].cosines["kl_divergence"] == pytest.approx(expected, abs=1e-5)
  assert measured[0].mass == (1, 1)


def test_defaults_are_an_untrained_student_and_default_codecs(logits, monkeypatch):
  def codecs(classes, temperature):
    assert (classes, temperature) == (100, 2.0)
    return [Dense("int8")]

  monkeypatch.setattr(estimates, "default_codecs", codecs)
  result = estimate(logits[0], temperature=2.0)
  assert result == estimate(logits[0], 0 * logits[0], temperature=2.0, codecs=[Dense("int8")])
  assert result != estimate(*logits, temperature=2.0)


def test_the_table_has_a_line_per_codec(measured):
  assert [estimate.codec for estimate in measured] == CODECS
  rows = [line.strip("| ").split(" | ") for line in estimate_table(measured).splitlines()]
  header, _, *lines = rows
  assert {len(line) for line in lines} == {len(header)}
  top = measured[1]
  losses_in_order = "sparse_kl", "sparse_kl_conditional", "sparse_kl_smoothed"
  numbers = [*top.mass, *(top.cosines[name] for name in losses_in_order)]
  assert lines[1] == ["TopK(5)", str(top.bytes), *(f"{number:.4f}" for number in numbers)]
  assert [line[0] for line in lines] == ["Dense(int8)", "TopK(5)", "RandomSampling(12)"]
  assert lines[2][2:4] == ["-", "-"] and math.isnan(measured[2].mass[0])


def test_default_codecs_fit_the_classes_and_the_temperature():
  codecs = default_codecs(16, temperature=2.0)
  assert [codec.k for codec in codecs if isinstance(codec, TopK)] == [1, 4, 16]
  assert {codec.temperature for codec in codecs if not isinstance(codec, Dense)} == {2.0}


def test_random_samples_are_unbiased_and_top_k_is_not(rng):
  times = 2000
  teacher = (rng.normal(size=300) - 1.1 * np.log(np.arange(1, 301))).astype(np.float32)
  student = (0.5 * teacher + rng.normal(size=300)).astype(np.float32)
  exact = softmax(student.astype(np.float64)) - softmax(teacher.astype(np.float64))
  biased = [losses.sparse_kl, losses.sparse_kl_smoothed, losses.sparse_kl_conditional]

  @jax.jit
  def gradients(teacher, student):
    rows = jnp.tile(teacher, (times, 1))
    batch = {"id": jnp.arange(times), "view": jnp.zeros(times, int)}
    samples = RandomSampling(20).decode(RandomSampling(20).encode(rows, batch), rows)
    gradient = jax.grad(losses.sampled_cross_entropy)
    top = TopK(30).decode(TopK(30).encode(rows[:1], {}), rows[:1])
    top = jax.tree.map(lambda x: x[0], top)
    return (
      jax.vmap(gradient, (None, 0))(student, samples),
      [jax.grad(loss)(student, top) for loss in biased],
    )

  sampled, top = jax.device_get(gradients(teacher, student))
  mean = sampled.astype(np.float64).mean(0)
  p = softmax(teacher.astype(np.float64))
  deviations = (mean - exact) / np.sqrt(p * (1 - p) / (20 * times))
  assert np.abs(deviations).max() < 5 and (deviations**2).mean() < 1.3
  error = np.linalg.norm(mean - exact)
  biases = [np.linalg.norm(gradient - exact) for gradient in top]
  assert min(biases) > 2 * error
  assert biases[2] > 0.3 * np.linalg.norm(exact) > 10 * error


@pytest.mark.integration
def test_the_bias_benchmark_prints_a_row_per_loss(monkeypatch, capsys):
  monkeypatch.syspath_prepend(BENCHMARKS)
  import sparse_bias

  sparse_bias.main(["--quick"])
  header, _, *rows = [
    line.strip("| ").split(" | ") for line in capsys.readouterr().out.strip().splitlines()
  ]
  assert len(rows) == 4 and {len(row) for row in rows} == {len(header)}
  errors = {tuple(row[::2][:2]): list(map(float, row[3:])) for row in rows}
  assert errors["TopK(16)", "sparse_kl_conditional"][0] > 0.5
  samples = errors["RandomSampling(50)", "sampled_cross_entropy"][1]
  assert samples < errors["TopK(16)", "sparse_kl"][1] / 2
