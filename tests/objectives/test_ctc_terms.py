"""CTC and frame terms: values against float64 formulas, masks, bad input."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from terms_by_hand import softmax64

from distill_jax import losses, reduce
from distill_jax.objectives import ctc, ctc_mean, frames, lattice, mutual, summed, weighted

KEY = jax.random.key(0)
T, V = 5, 4


def evaluate(term, student, teacher=None, batch=None):
  """Returns values, where and the gradient of the mean by the student's logits, compiled."""
  teacher = {} if teacher is None else teacher
  variables = term.init(KEY, student, teacher)
  ints = {name: x for name, x in student.items() if name != "logits"}

  @jax.jit
  def run(z, ints, teacher, batch):
    def mean(z):
      value, _ = term.apply(
        *variables, {"logits": z, **ints}, teacher, batch, step=jnp.int32(0), key=KEY
      )
      return reduce.mean(*value), value

    return jax.value_and_grad(mean, has_aux=True)(z)

  (_, (values, where)), gradient = run(student["logits"], ints, teacher, batch or {})
  return values, where, gradient


def kl(p, q):
  return (p * np.log(p / q)).sum(-1)


def frames_by_hand(s, t, *, blank=0, mode="all", temperature=1.0):
  """Returns KL of each frame [N]; of blank and label where the blank is most probable."""
  q, p = (softmax64(np.float64(x) / temperature) for x in (s, t))
  values = kl(p, q)
  if mode == "collapsed":
    two = [np.stack([x[:, blank], 1 - x[:, blank]], -1) for x in (p, q)]
    values = np.where(t.argmax(-1) == blank, kl(*two), values)
  return temperature**2 * values


def ctc_by_paths(z, target, blank=0):
  """-log of the sum over all paths that collapse to the target, in float64."""
  p = softmax64(np.float64(z))
  total = 0.0
  for path in itertools.product(range(z.shape[1]), repeat=len(z)):
    merged = [c for c, _ in itertools.groupby(path)]
    if [c for c in merged if c != blank] == list(target):
      total += np.prod(p[np.arange(len(z)), path])
  return -np.log(total)


TARGETS = [[1, 2], [3, 3], [1], [2, 2, 2], [], [1, 2, 3], None, [2]]
LENGTHS = [5, 3, 5, 4, 2, 3, 5, 0]
FITS = [True, True, True, False, True, True, False, False]


def transcripts(blank, pad):
  rows = np.full((len(TARGETS), 3), pad, np.int32)
  for row, target in zip(rows, TARGETS):
    row[:] = blank if target == [] else -1 if target is None else pad
    classes = [blank if c == 0 else c for c in target or []]
    row[: len(classes)] = [c - 1 if blank == V - 1 else c for c in classes]
  return rows


@pytest.mark.parametrize(("blank", "pad"), [(0, -1), (3, 3)])
def test_ctc_is_the_sum_over_all_paths(rng, blank, pad):
  """Equal neighbors, empty and missing transcripts, too few frames and none; NaN in the padding."""
  label = transcripts(blank, pad)
  z = rng.normal(size=(len(LENGTHS), T, V)).astype(np.float32)
  is_valid = np.arange(T) < np.array(LENGTHS)[:, None]
  student = {
    "logits": np.where(is_valid[..., None], z, np.float32(np.nan)),
    "lengths": np.array(LENGTHS, np.int32),
  }
  batch = {"label": label}
  values, where, gradient = evaluate(ctc(blank=blank), student, batch=batch)
  np.testing.assert_array_equal(where, FITS)
  for row in np.flatnonzero(FITS):
    target = [c for c in label[row] if c >= 0 and c != blank]
    expected = ctc_by_paths(z[row, : LENGTHS[row]], target, blank)
    np.testing.assert_allclose(values[row], expected, rtol=2e-5)
  assert np.isfinite(gradient).all() and (gradient[~is_valid] == 0).all()
  assert (gradient[~np.array(FITS)] == 0).all() and (abs(gradient[0]) > 1e-4).any()
  divided, _, _ = evaluate(ctc(blank=blank, per_label=True), student, batch=batch)
  counts = [len(target or []) for target in TARGETS]
  np.testing.assert_allclose(divided, values / np.maximum(counts, 1), rtol=1e-6)


def test_ctc_of_bfloat16_of_missing_classes_and_of_masked_rows(rng):
  z = jnp.asarray(rng.normal(size=(3, T, V)), jnp.bfloat16).at[..., 3].set(-jnp.inf)
  z = z.at[2].set(jnp.nan)
  batch = {"words": np.array([[1, 2, 0]] * 3, np.int32), "where": np.array([True, True, False])}
  values, where, gradient = evaluate(ctc(entry="words"), {"logits": z}, batch=batch)
  expected = ctc_by_paths(np.asarray(z[0], np.float32)[:, :3], [1, 2])
  np.testing.assert_allclose(values[0], expected, rtol=2e-5)
  assert values.dtype == jnp.float32 and where.tolist() == [True, True, False]
  assert np.isfinite(gradient.astype(jnp.float32)).all()


def test_too_long_transcripts_are_a_metric():
  student = {"logits": jnp.zeros((3, 2, V))}
  batch = {"label": np.array([[1, 1], [1, 2], [-1, -1]], np.int32)}

  for name, term in (("hard", ctc()), ("both/0", summed(ctc()))):
    objective = weighted(**{name.split("/")[0]: (2.0, term)})
    variables = objective.init(KEY, student, {})

    @jax.jit
    def total(variables, objective=objective, name=name):
      terms, _ = objective.apply(*variables, student, {}, batch, step=jnp.int32(0), key=KEY)
      weight, value = terms[f"{name}/too_long"]
      return weight, *reduce.total(*value)

    assert total(variables) == (0, 1, 2)


def test_bad_numbers_raise_and_are_nan_where_compiled():
  lengths = np.array([T + 1, -1, T, T, T], np.int32)
  label = np.array([[1, 2], [1, 2], [1, V], [-1, 2], [1, 2]], np.int32)
  student = {"logits": jnp.zeros((5, T, V)), "lengths": lengths}
  for row, field in enumerate(("lengths", "lengths", "label", "label")):
    one = {name: x[row : row + 1] for name, x in student.items()}
    batch = {"label": label[row : row + 1]}
    with pytest.raises(ValueError, match=field):
      ctc().apply({}, {}, one, {}, batch, step=0, key=KEY)
  values, where, _ = evaluate(ctc(), student, batch={"label": label})
  assert where.all() and np.isnan(values).tolist() == [True] * 4 + [False]


@pytest.mark.parametrize(
  ("term", "student", "label", "field"),
  [
    (ctc(), (2, V), [[1]], "logits"),
    (ctc(), (2, 0, V), [[1]] * 2, "logits"),
    (ctc(blank=V), (2, T, V), [[1]] * 2, "blank"),
    (ctc(), (2, T, V), [1, 2], "label"),
    (ctc(), (2, T, V), [[1]], "label"),
    (ctc(), (2, T, V), [[1.0]] * 2, "label"),
    (ctc(lengths="frame"), (2, T, V), [[1]] * 2, "lengths"),
  ],
)
def test_ctc_names_what_does_not_fit(term, student, label, field):
  outputs = {"logits": np.zeros(student, np.float32)}
  with pytest.raises(ValueError, match=field):
    term.init(KEY, outputs, {})
    term.apply({}, {}, outputs, {}, {"label": np.array(label)}, step=0, key=KEY)


def two_networks(rng, student_frames=T, teacher_frames=T, classes=(V, V)):
  """Returns outputs with NaN in the padding, and the logits and lengths of both."""
  sides = []
  for size, lengths, width in (
    (student_frames, [student_frames, 2, 0], classes[0]),
    (teacher_frames, [teacher_frames - 1, 2, 1], classes[1]),
  ):
    z = 2 * rng.normal(size=(3, size, width)).astype(np.float32)
    is_valid = np.arange(size) < np.array(lengths)[:, None]
    padded = np.where(is_valid[..., None], z, np.float32(np.nan))
    sides.append(({"logits": padded, "lengths": np.array(lengths, np.int32)}, z, lengths))
  return sides


@pytest.mark.parametrize("mode", ["all", "nonblank", "collapsed"])
def test_frames_compare_what_is_valid_on_both_sides(rng, mode):
  (student, s, s_len), (teacher, t, t_len) = two_networks(rng)
  term = frames(losses.ctc_frames, mode=mode, blank=1, temperature=2.0)
  values, where, gradient = evaluate(term, student, teacher)
  expected = np.arange(T) < np.minimum(s_len, t_len)[:, None]
  if mode == "nonblank":
    expected &= t.argmax(-1) != 1
  np.testing.assert_array_equal(where, expected)
  by_hand = frames_by_hand(s[expected], t[expected], blank=1, mode=mode, temperature=2.0)
  np.testing.assert_allclose(values[where], by_hand, rtol=1e-4, atol=1e-5)
  assert np.isfinite(gradient).all() and (gradient[~expected] == 0).all()


def test_frames_of_a_cached_top_k_and_of_a_teacher_without_lengths(rng):
  (student, s, s_len), (teacher, t, _) = two_networks(rng)
  targets = losses.top_k(jnp.asarray(t), V - 1)
  term = frames(losses.sparse_kl, mode="nonblank")
  values, where, gradient = evaluate(term, student, {"logits": targets})
  expected = (np.arange(T) < np.array(s_len)[:, None]) & (t.argmax(-1) != 0)
  np.testing.assert_array_equal(where, expected)
  full = frames_by_hand(s[expected], t[expected])  # All but one class: the tail is exact.
  np.testing.assert_allclose(values[where], full, rtol=1e-3, atol=1e-4)
  assert np.isfinite(gradient).all()


def test_frames_resample_the_teachers_probabilities(rng):
  """Twice the rate: pairs of frames are averaged, with the tails of triangles; equal rates stay."""
  (student, s, _), (teacher, t, _) = two_networks(rng)
  same, where, _ = evaluate(frames(losses.kl_divergence, resample=True), student, student)
  np.testing.assert_allclose(same[where], 0, atol=1e-5)
  p = np.repeat(np.float64([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]]), 4, 0)
  fast = {"logits": np.log(p)[None].astype(np.float32), "lengths": np.array([8], np.int32)}
  slow = {"logits": np.log(p[::2])[None].astype(np.float32), "lengths": np.array([4], np.int32)}
  values, where, _ = evaluate(frames(losses.kl_divergence, resample=True), slow, fast)
  assert where.all()
  np.testing.assert_allclose(values[0, [0, 3]], 0, atol=1e-6)  # Far from the change.
  assert (values[0, 1:3] > 1e-3).all()
  with pytest.raises(ValueError, match=r"logits.*4.*8"):
    frames(losses.kl_divergence).init(KEY, slow, fast)
  with pytest.raises(ValueError, match="lengths"):
    evaluate(frames(losses.kl_divergence, resample=True), slow, {"logits": fast["logits"]})


def test_one_entry_cannot_count_the_frames_of_two_rates():
  """In silence the faster network's last frames were left out."""
  slow, fast = {"logits": jnp.zeros((1, 4, 3))}, {"logits": jnp.zeros((1, 8, 3))}
  batch = {"lengths": jnp.array([3])}
  for term in (frames(losses.kl_divergence, resample=True), ctc_mean()):
    with pytest.raises(ValueError, match="lengths"):
      term.apply({}, {}, slow, fast, batch, step=0, key=KEY)
    counted = {"lengths": jnp.array([6])}  # The entry is that of the other network.
    (_, where), _ = term.apply({}, {}, slow, fast | counted, batch, step=0, key=KEY)
    assert np.sum(where) == {2: 3, 1: 1}[where.ndim]
    term.apply({}, {}, slow, slow, batch, step=0, key=KEY)


def test_means_over_other_numbers_of_frames(rng):
  (student, s, s_len), (teacher, t, t_len) = two_networks(rng, teacher_frames=7)
  term = ctc_mean(losses.jensen_shannon, temperature=2.0, teacher_weight=0.3)
  values, where, gradient = evaluate(term, student, teacher)
  assert where.tolist() == [True, True, False]
  for row in (0, 1):
    q, p = (
      softmax64(np.float64(x[row, : n[row]]) / 2).mean(0) for x, n in ((s, s_len), (t, t_len))
    )
    m = 0.3 * p + 0.7 * q
    np.testing.assert_allclose(values[row], 4 * (0.3 * kl(p, m) + 0.7 * kl(q, m)), rtol=1e-4)
  is_valid = np.arange(T) < np.where(where, s_len, 0)[:, None]
  assert np.isfinite(gradient).all() and (gradient[~is_valid] == 0).all()


def test_frames_and_means_name_what_does_not_fit(rng):
  (student, *_), (teacher, *_) = two_networks(rng, classes=(V, V + 1))
  for term in (frames(losses.kl_divergence), ctc_mean()):
    with pytest.raises(ValueError, match=r"logits.*4.*5.*uld"):
      term.init(KEY, student, teacher)
  values, where, _ = evaluate(frames(losses.uld), student, teacher)
  assert where.any() and np.isfinite(values).all()
  for make, field in (
    (functools.partial(frames, losses.dkd), "labels"),
    (functools.partial(frames, losses.dist), "where"),
    (functools.partial(frames, losses.kl_divergence, mode="collapsed"), "mode"),
    (functools.partial(frames, losses.ctc_frames, mode="blank"), "mode"),
    (functools.partial(frames, losses.kl_divergence, tau=1), "tau"),
    (functools.partial(ctc_mean, temperature=0), "temperature"),
  ):
    with pytest.raises(ValueError, match=field):
      make()
  teacher = {"logits": student["logits"], "lengths": np.array([T + 1] * 3, np.int32)}
  for term in (frames(losses.kl_divergence), ctc_mean()):
    with pytest.raises(ValueError, match="lengths"):
      term.apply({}, {}, student, teacher, {}, step=0, key=KEY)
    values, where, _ = evaluate(term, student, teacher)
    assert np.isnan(reduce.mean(values, where))


def test_lattice_nodes_beyond_frames_and_classes_do_not_count(rng):
  z = rng.normal(size=(2, 3, 3, 4, V)).astype(np.float32)
  label = np.array([[1, 2, -1], [3, 0, 0], [-1, -1, -1]], np.int32)
  lengths, nodes = np.array([3, 2, 3]), np.array([3, 2, 0])
  is_node = np.arange(4) < nodes[:, None, None]
  expected = (np.arange(3)[:, None] < lengths[:, None, None]) & is_node
  s, t = (np.where(expected[..., None], x, np.float32(np.nan)) for x in z)
  student, teacher = ({"logits": x, "lengths": lengths.astype(np.int32)} for x in (s, t))
  values, where, gradient = evaluate(lattice(), student, teacher, {"label": label})
  np.testing.assert_array_equal(where, expected)
  assert np.isfinite(gradient).all() and (gradient[~expected] == 0).all()
  q, p = (softmax64(x[1, 1, 0]) for x in z)  # Frame 1 of row 1, whose next class is 3.
  three = [np.array([x[3], x[0], x[1] + x[2]]) for x in (p, q)]
  np.testing.assert_allclose(values[1, 1, 0], kl(*three), rtol=1e-4)
  q, p = (softmax64(x[1, 1, 1]) for x in z)  # No next class: blank or others.
  np.testing.assert_allclose(
    values[1, 1, 1], kl(*[np.array([x[0], 1 - x[0]]) for x in (p, q)]), rtol=1e-4
  )


def test_mutual_learning_of_ctc_networks(rng):
  """A cohort's outputs have the number of their network; the frames' mean is over those that count
  for a pair."""
  (first, s, s_len), (second, t, t_len) = two_networks(rng)
  cohort = {f"{i}/{name}": x for i, net in enumerate((first, second)) for name, x in net.items()}
  where = np.arange(T) < np.minimum(s_len, t_len)[:, None]
  batch = {"label": np.array([[1, 2], [1, -1], [-1, -1]], np.int32)}
  term = mutual(losses.ctc_frames, 2, compare=frames, mode="nonblank")
  term.init(KEY, cohort, {})

  @jax.jit
  def mean(cohort):
    value, _ = term.apply({}, {}, cohort, {}, batch, step=jnp.int32(0), key=KEY)
    return reduce.mean(*value)

  means = []
  for x, y in ((s, t), (t, s)):
    counted = where & (y.argmax(-1) != 0)
    means.append(frames_by_hand(x[counted], y[counted]).mean())
  np.testing.assert_allclose(mean(cohort), sum(means), rtol=1e-4)

  @jax.jit
  def hard(cohort):
    return ctc(output="1/logits").apply({}, {}, cohort, {}, batch, step=0, key=KEY)[0]

  values, counted = hard(cohort)
  assert counted.tolist() == [True, True, False]
  np.testing.assert_allclose(values[0], ctc_by_paths(t[0, : t_len[0]], [1, 2]), rtol=2e-5)
