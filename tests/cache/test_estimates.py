"""Estimates of codecs against float64 NumPy, and the bias of top k beside draws that have none."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from distill_jax import losses
from distill_jax.cache import Dense, RandomSampling, TopK
from distill_jax.cache.codecs.estimates import (
  default_codecs,
  estimate,
  estimate_table,
  row_bytes,
  top_k_mass,
)

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def logits(rng):
  """Of a teacher and a student."""
  return (3 * rng.normal(size=(2, 40, 100))).astype(np.float32)


def cosine(a, b):
  return (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("shape", [(40, 100), (8, 5, 100)])
def test_mass_kept_and_its_fifth_percentile(logits, shape):
  p = -np.sort(-softmax(logits[0].astype(np.float64) / 2, -1), -1)
  for k in (1, 4, 100):
    mass = p[:, :k].sum(-1)
    found = top_k_mass(logits[0].reshape(shape), k, temperature=2.0)
    np.testing.assert_allclose(found, (mass.mean(), np.percentile(mass, 5)), rtol=1e-5)


def test_bytes_of_an_example():
  output = jax.ShapeDtypeStruct((7, 3, 100), jnp.float32)
  sizes = {
    Dense("float16"): 600,
    Dense("int8"): 300 + 12,
    TopK(4): 3 * (4 + 4 + 8),
    RandomSampling(12): 3 * 12,
  }
  assert {codec: row_bytes(codec, output) for codec in sizes} == sizes


def test_cosines_are_those_of_the_gradients_at_the_student(logits):
  t, s = logits.astype(np.float64)
  p, q = softmax(t / 2, -1), softmax(s / 2, -1)
  kept = np.argsort(-p, -1)[:, :5]
  inside = np.zeros_like(p, bool)
  np.put_along_axis(inside, kept, True, -1)
  conditional = np.where(inside, q, 0) / (q * inside).sum(-1, keepdims=True)
  conditional -= np.where(inside, p, 0) / (p * inside).sum(-1, keepdims=True)
  others, left = q * ~inside, (p * ~inside).sum(-1, keepdims=True)
  bucket = np.where(inside, q - p, others * (1 - left / others.sum(-1, keepdims=True)))
  smoothed = q - np.where(inside, p, left / 95)
  (found,) = estimate(logits[0], logits[1], codecs=[TopK(5, 2.0, bits=16)])
  expected = {
    "sparse_kl": bucket,
    "sparse_kl_conditional": conditional,
    "sparse_kl_smoothed": smoothed,
  }
  assert found.cosines == pytest.approx(
    {name: cosine(x, q - p) for name, x in expected.items()}, abs=1e-4
  )


def test_a_student_that_knows_nothing_and_the_usual_choices_are_the_defaults(logits, monkeypatch):
  def usual(classes, temperature):
    assert (classes, temperature) == (100, 2.0)
    return [Dense("int8")]

  monkeypatch.setattr("distill_jax.cache.codecs.estimates.default_codecs", usual)
  found = estimate(logits[0], temperature=2.0)
  assert found == estimate(logits[0], 0 * logits[0], temperature=2.0, codecs=[Dense("int8")])
  assert found != estimate(*logits, temperature=2.0)


def test_dense_codecs_are_measured_at_the_temperature_given(logits):
  for temperature in (1.0, 4.0):
    (found,) = estimate(*logits, codecs=[Dense("int8")], temperature=temperature)
    t, s = logits
    step = np.abs(t).max(-1, keepdims=True) / 127
    p, q, stored = (softmax(z / temperature, -1) for z in (t, s, np.round(t / step) * step))
    assert found.cosines["kl_divergence"] == pytest.approx(cosine(q - stored, q - p), abs=1e-5)
    assert found.mass == (1, 1)


def test_the_table_has_a_line_for_each_codec(logits):
  codecs = [Dense("int8"), TopK(64, 2.0), RandomSampling(12)]
  found = estimate(*logits, codecs=codecs)
  assert [e.codec for e in found] == codecs
  header, _, *lines = [line.strip("| ").split(" | ") for line in estimate_table(found).splitlines()]
  assert {len(line) for line in lines} == {len(header)}
  top = found[1]
  assert lines[1] == [
    "TopK(64)",
    str(top.bytes),
    f"{top.mass[0]:.4f}",
    f"{top.mass[1]:.4f}",
    *(
      f"{top.cosines[name]:.4f}"
      for name in ("sparse_kl", "sparse_kl_conditional", "sparse_kl_smoothed")
    ),
  ]
  assert [line[0] for line in lines] == ["Dense(int8)", "TopK(64)", "RandomSampling(12)"]
  assert lines[2][2:4] == ["-", "-"] and math.isnan(found[2].mass[0])


def test_the_usual_choices_fit_the_classes_and_the_temperature():
  made = default_codecs(16, temperature=2.0)
  assert [c.k for c in made if isinstance(c, TopK)] == [1, 4, 16]
  assert {c.temperature for c in made if not isinstance(c, Dense)} == {2.0}


def test_logits_that_differ_are_refused(logits):
  with pytest.raises(ValueError, match=r"student \(40, 99\)"):
    estimate(logits[0], logits[1][:, 1:], codecs=[TopK(1)])


def gradients(codec, loss, teacher, student, times):
  """Of the loss, for the teacher stored so many times."""

  @jax.jit
  def each(rows):
    targets = codec.decode(
      codec.encode(rows, {"id": jnp.arange(times), "view": jnp.zeros(times, int)}), rows
    )
    return jax.vmap(jax.grad(loss), (None, 0))(student, targets)

  return np.asarray(each(np.tile(teacher, (times, 1))), np.float64)


def test_draws_are_unbiased_and_top_k_is_not(rng):
  teacher = (rng.normal(size=300) - 1.1 * np.log(np.arange(1, 301))).astype(np.float32)
  student = (0.5 * teacher + rng.normal(size=300)).astype(np.float32)
  p, q = softmax(teacher.astype(np.float64)), softmax(student.astype(np.float64))
  each = gradients(RandomSampling(10), losses.sampled_cross_entropy, teacher, student, 5000)
  deviations = (each.mean(0) - (q - p)) / np.sqrt(p * (1 - p) / (10 * 5000))
  assert np.abs(deviations).max() < 5 and (deviations**2).mean() < 1.3
  error = np.linalg.norm(each.mean(0) - (q - p))
  biases = {
    loss: np.linalg.norm(gradients(TopK(30), loss, teacher, student, 1)[0] - (q - p))
    for loss in (losses.sparse_kl, losses.sparse_kl_smoothed, losses.sparse_kl_conditional)
  }
  assert min(biases.values()) > 2 * error
  assert biases[losses.sparse_kl_conditional] > 0.3 * np.linalg.norm(q - p) > 10 * error


def test_the_benchmark_of_the_bias_prints_a_row_for_each_loss(monkeypatch, capsys):
  monkeypatch.syspath_prepend(BENCHMARKS)
  import sparse_bias

  sparse_bias.main(["--quick"])
  header, _, *rows = [
    line.strip("| ").split(" | ") for line in capsys.readouterr().out.strip().splitlines()
  ]
  assert len(rows) == 4 and {len(row) for row in rows} == {len(header)}
  errors = {tuple(row[::2][:2]): list(map(float, row[3:])) for row in rows}
  assert errors["TopK(16)", "sparse_kl_conditional"][0] > 0.5
  assert (
    errors["RandomSampling(50)", "sampled_cross_entropy"][1]
    < errors["TopK(16)", "sparse_kl"][1] / 2
  )
