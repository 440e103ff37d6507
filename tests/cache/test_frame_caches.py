"""Caches of frames: logits, numbers of frames and codes; the training is that of a live teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_ctc
from fitting import fit_with

from distill_jax import cache, losses, reduce
from distill_jax.cache import Codes, Dense, Mismatch, TopK, write_cache
from distill_jax.data import audio
from distill_jax.objectives import codes, ctc, frames, weighted
from distill_jax.teachers import fit_codebook, read_entries, with_codes
from distill_jax.teachers.codebooks import nearest_codes

CODES, BOOKS = 4, 2


def coded_teacher(seed=0):
  features = np.random.default_rng(seed).normal(size=(64, 8))
  codebook = fit_codebook(features, CODES, num_codebooks=BOOKS)
  return with_codes(small_ctc.frozen(scale=2.0), "block1", codebook)


OUTPUTS = {
  "logits": Dense("float32"),
  "logits@top3": TopK(3),
  "lengths": Codes(small_ctc.T + 1),
  "codes": Codes(CODES),
}


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
  folder = tmp_path_factory.mktemp("frames") / "cache"
  return write_cache(
    folder, coded_teacher(), small_ctc.source(), OUTPUTS, batch_size=8, progress=False
  )


def test_rows_come_back_with_lengths_and_codes(cached):
  source, teacher = small_ctc.source(), coded_teacher()
  batch = {"id": source.ids, **source.arrays}
  stored = cached.model.apply({}, {}, cached.add_columns(batch), train=False, key=None)[0]
  live = jax.jit(lambda batch: teacher.apply(*teacher.variables, batch, train=False, key=None)[0])
  outputs = live(batch)
  for name in ("lengths", "codes"):
    np.testing.assert_array_equal(stored[name], outputs[name])
    assert stored[name].dtype == outputs[name].dtype
  np.testing.assert_allclose(stored["logits"], outputs["logits"], rtol=1e-6, atol=1e-6)
  sizes = {column.name: column.dtype for column in cached.manifest.columns}
  assert sizes["lengths.values"] == sizes["codes.values"] == "|u1"
  agreement = cache.verify(cached, teacher, source, n=small_ctc.ROWS)
  assert agreement["codes"].difference == agreement["lengths"].difference == 0
  assert len(np.unique(stored["codes"])) > 1


def test_another_codebook_is_another_teacher(cached):
  with pytest.raises(Mismatch, match="teacher"):
    write_cache(
      cached.store.url, coded_teacher(1), small_ctc.source(), OUTPUTS, batch_size=8, progress=False
    )


def test_training_from_frames_is_that_of_a_live_teacher(cached):
  """The rows that do not fit are a metric, and a warning."""
  objective = weighted(
    ctc=(0.1, ctc()),
    frames=(1.0, frames(losses.ctc_frames, mode="collapsed")),
    codes=(0.1, codes("block1", num_codes=CODES)),
  )
  results = []
  for teacher in (coded_teacher(), cached):
    with pytest.warns(UserWarning, match="ctc/too_long"):
      results.append(
        fit_with(
          small_ctc.network(),
          teacher,
          objective,
          optax.adam(1e-2),
          small_ctc.source(),
          steps=30,
          batch_size=small_ctc.ROWS,
          log_every=10,
        )
      )
  live, stored = (result.state.params for result in results)
  for x, y in zip(jax.tree.leaves(live), jax.tree.leaves(stored)):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
  lines = [line for line in results[0].history if line["phase"] == "train"]
  assert lines[-1]["ctc/too_long"] == pytest.approx(1 / (small_ctc.ROWS - 1))
  assert all(lines[-1][name] < lines[0][name] for name in ("ctc", "frames", "codes"))
  assert all(line["nonfinite"] == 0 and line["empty"] == 0 for line in lines)


def test_codes_of_residuals_and_their_errors(rng):
  features = rng.normal(size=(50, 3)).astype(np.float32)
  codebook = fit_codebook(features, 5, num_codebooks=2)
  found = nearest_codes(jnp.asarray(features), jnp.asarray(codebook))
  first = ((features[:, None] - codebook[0]) ** 2).sum(-1).argmin(1)
  rest = features - codebook[0][first]
  second = ((rest[:, None] - codebook[1]) ** 2).sum(-1).argmin(1)
  np.testing.assert_array_equal(found, np.stack([first, second], 1))
  assert ((rest - codebook[1][second]) ** 2).mean() < (rest**2).mean()
  for bad in (features[:4], features[0], np.full((9, 3), np.nan)):
    with pytest.raises(ValueError, match="features"):
      fit_codebook(bad, 5)
  teacher = with_codes(small_ctc.frozen(), "block9", codebook)
  batch = {name: x[:2] for name, x in small_ctc.source().arrays.items()}
  with pytest.raises(ValueError, match="layer"):
    teacher.apply(*teacher.variables, batch, train=False, key=None)
  with pytest.raises(ValueError, match="codebook"):
    with_codes(small_ctc.frozen(), "block1", codebook[0])
  errors = Codes(300).errors(jnp.array([[0, 299], [0, 300], [-1, 0]]))
  assert (np.asarray(errors) > 0).tolist() == [False, True, True]
  with pytest.raises(ValueError, match="num_codes"):
    Codes(0)
  with pytest.raises(ValueError, match="integers"):
    Codes(9).columns(jnp.zeros((2, 3)))


def test_cross_entropy_of_codes_with_another_frame_rate(rng):
  """The student's frames are interpolated; what is not valid on both sides does not count."""
  hidden = rng.normal(size=(2, 3, 4)).astype(np.float32)
  ids = rng.integers(0, 5, (2, 6, 2)).astype(np.int32)
  student = {"h": np.where(np.arange(3)[:, None] < 2, hidden, np.nan), "lengths": np.array([2, 0])}
  teacher = {"codes": ids, "lengths": np.array([4, 6])}
  term = codes("h", num_codes=5, resample=True)
  params, state = term.init(jax.random.key(0), student, teacher)

  @jax.jit
  @jax.grad
  def gradient(params, student=student, teacher=teacher):
    value, _ = term.apply(params, state, student, teacher, {}, step=0, key=None)
    return reduce.mean(*value)

  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient(params)))
  (values, where), _ = term.apply(params, state, student, teacher, {}, step=0, key=None)
  np.testing.assert_array_equal(where, np.arange(6) < np.array([[4], [0]]))
  weights = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
  z = (weights @ hidden[0, :2] @ params["kernel"] + params["bias"]).reshape(4, 2, 5)
  log_q = z - np.log(np.exp(z).sum(-1, keepdims=True))
  expected = -np.take_along_axis(log_q, ids[0, :4, :, None], -1)[..., 0].mean(-1)
  np.testing.assert_allclose(values[0, :4], expected, rtol=1e-4)
  (values, _), _ = term.apply(
    params, state, student, {**teacher, "codes": ids + 5}, {}, step=0, key=None
  )
  assert np.isnan(values).all()
  with pytest.raises(ValueError, match="resample"):
    codes("h", num_codes=5).init(jax.random.key(0), student, teacher)


def test_views_that_only_the_student_reads_are_stored_once(tmp_path):
  masks = audio.spec_augment(seed=0, band_width=3, time_width=2, into="masked")
  arguments = (small_ctc.frozen(), small_ctc.source(), {"logits": Dense("float32")})
  options = {"batch_size": 8, "progress": False}
  stored = write_cache(tmp_path, *arguments, **options, augment=masks, num_views=3)
  assert len(stored) == small_ctc.ROWS and not stored.has_views
  assert len(write_cache(tmp_path, *arguments, **options)) == small_ctc.ROWS


def test_student_of_a_clean_cached_teacher_hears_new_masks_in_each_epoch(cached):
  """Its masks were those of the first epoch: a cache of one view had set that of the run."""
  student = read_entries(small_ctc.network(), {"features": "masked"})
  masks = audio.spec_augment(seed=0, band_width=3, time_width=2, into="masked")
  objective = weighted(frames=(1.0, frames(losses.kl_divergence)))
  options = {"steps": 3, "batch_size": small_ctc.ROWS, "augment": masks}
  live, stored, fixed = (
    fit_with(student, teacher, objective, optax.sgd(0.1), small_ctc.source(), **run).state.params
    for teacher, run in (
      (coded_teacher(), options),
      (cached, options),
      (cached, options | {"num_views": 1}),
    )
  )
  for x, y, z in zip(*map(jax.tree.leaves, (live, stored, fixed))):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    assert np.abs(x - z).max() > 1e-3
