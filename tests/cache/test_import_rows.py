"""Checks the caches of outputs that others computed: equal to our own, resumed, and never wrong."""

import jax.numpy as jnp
import numpy as np
import pytest
from imported import columns_of, lists_of
from toys import AUGMENT, CLASSES, ROWS, linear, teacher_logits, written

from distill_jax import data
from distill_jax.cache import (
  CorruptCache,
  Dense,
  Incomplete,
  Mismatch,
  RandomSampling,
  TopK,
  check_run,
  check_teacher_weights,
  describe,
  import_rows,
  open_cache,
  verify,
)
from distill_jax.cache.importing import importer, row_checks
from distill_jax.storage.lease import Lease, LeaseError

TOP = {"logits": TopK(3)}


def imported(folder, rows, source, outputs=None, **settings):
  settings = dict(identity="somebody's teacher", progress=False) | settings
  return import_rows(folder, rows, source, outputs, **settings)


def logits_rows(source, rng=None, view=0):
  """Returns rows of the logits of `linear()`, in a random order."""
  logits = teacher_logits(source.arrays["image"]).astype(np.float32)
  order = np.arange(len(source)) if rng is None else rng.permutation(len(source))
  return [(int(source.ids[at]), view, {"logits": logits[at]}) for at in order]


def list_rows(source, k=3):
  return [(id, view, lists_of(x["logits"], k)) for id, view, x in logits_rows(source)]


def test_rows_of_logits_are_stored_as_write_cache_does(tmp_path, source):
  outputs = {
    "logits": Dense("float16"),
    "logits@top": TopK(3, temperature=2.0),
    "logits@samples": RandomSampling(4),
  }
  own = written(tmp_path / "own", source, outputs=outputs)
  rows = logits_rows(source, np.random.default_rng(3))
  cache = imported(tmp_path / "imported", rows, source, outputs, inputs=["image"])
  stored = columns_of(cache, source)
  for name, values in columns_of(own, source).items():
    np.testing.assert_array_equal(stored[name], values)
  assert cache.check_checksums()["rows"] == ROWS
  assert sorted(path.name for path in (tmp_path / "imported").iterdir()) == sorted(
    path.name for path in (tmp_path / "own").iterdir()
  )
  check_run(cache, source)
  assert "somebody's teacher" in describe(cache, source)
  assert verify(cache, linear(), source)["logits"].top1 == 1
  own_data, imported_data = (c.manifest.identity["data"] for c in (own, cache))
  assert own_data == imported_data


def test_lists_of_all_classes_are_stored_as_write_cache_does(tmp_path, source):
  outputs = {"logits": TopK(CLASSES)}
  own = columns_of(written(tmp_path / "own", source, outputs=outputs), source)
  stored = columns_of(
    imported(tmp_path / "imported", list_rows(source, CLASSES), source, outputs), source
  )
  for name in ("indices", "codes", "log_odds"):
    key = f"teacher/logits.{name}"
    np.testing.assert_array_equal(stored[key], own[key])
  assert (stored["teacher/logits.label_log_prob"] == 1).all()  # unknown


def test_views_are_those_of_the_augmentation(tmp_path, source):
  rows = logits_rows(source, view=1) + logits_rows(source)
  settings = dict(augment=AUGMENT, num_views=2, inputs=["image"])
  cache = imported(tmp_path, rows, source, **settings)
  assert len(cache) == 2 * ROWS
  with pytest.raises(Mismatch, match="augmentation"):
    check_run(cache, source)


@pytest.mark.parametrize("rounding", [np.float16, jnp.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_rounded_log_probabilities_are_accepted(rounding, scale):
  rng = np.random.default_rng(0)
  spec = row_checks.RowSpec((500, 300), 300, 16)
  lists = lists_of(scale * rng.normal(size=spec.shape), 16)
  exact = row_checks.check_row(spec, (0, 0, lists))[2]
  rounded = lists | {"logprobs": lists["logprobs"].astype(rounding)}
  targets = row_checks.check_row(spec, (0, 0, rounded))[2]
  np.testing.assert_allclose(targets.log_probs, exact.log_probs, rtol=2**-8)


def changed(**values):
  return lambda lists: lists | {name: change(lists[name]) for name, change in values.items()}


def at_three(value, entry=2):
  def change(x):
    x = x.copy()
    x[3, entry] = value
    return x

  return change


WRONG_LISTS = {
  "log-probabilities of at most 0": changed(logprobs=at_three(0.5, 0)),
  "probabilities: take their log": changed(logprobs=np.exp),
  "subtract logsumexp": changed(logprobs=lambda x: x + 20),
  "position 3: expected log-probabilities, got": changed(logprobs=at_three(np.nan)),
  "at most 0, got inf": changed(logprobs=at_three(np.inf)),
  "classes 0 to 299, got 300": changed(indices=at_three(300)),
  "classes 0 to 299, got -1": changed(indices=at_three(-1)),
  "position 3: expected each class once": changed(indices=lambda x: at_three(x[3, 0])(x)),
  "sum to at most 1.*base 10": changed(logprobs=lambda x: x / np.log(10)),
  "smallest listed.*base 2": changed(logprobs=lambda x: x / np.log(2)),
  "smallest listed": changed(logprobs=lambda x: x - 3),
  "at least 8 .*got 5": changed(indices=lambda x: x[:, :5], logprobs=lambda x: x[:, :5]),
  "of shape .*got .19, 8": changed(indices=lambda x: x[:-1], logprobs=lambda x: x[:-1]),
  "at temperature 1, .*got 2": lambda lists: lists | {"temperature": 2.0},
  "integer 'indices'": changed(indices=lambda x: x.astype(float)),
  "in the list or below it": lambda lists: lists | {"label_logprobs": np.full(20, -1e-4)},
  "of labels of at most 0": lambda lists: lists | {"label_logprobs": np.full(20, 0.1)},
}


@pytest.mark.parametrize("reason", WRONG_LISTS)
def test_wrong_lists_are_refused(reason):
  spec = row_checks.RowSpec((20, 300), 300, 8)
  # Sharp at some positions, flat at others, as a language model is.
  sharpness = np.linspace(0.5, 6, 20)[:, None]
  lists = lists_of(sharpness * np.random.default_rng(1).normal(size=spec.shape), 8)
  row_checks.check_row(spec, (7, 0, lists))
  with pytest.raises(ValueError, match=f"example id 7, view 0.*{reason}"):
    row_checks.check_row(spec, (7, 0, WRONG_LISTS[reason](lists)))


WRONG_LOGITS = {
  "floating logits of shape .*got float32 .4,": np.zeros(4, np.float32),
  "floating logits": np.zeros(5, np.int32),
  "got nan for class 2": np.array([0, 1, np.nan, 0, 0]),
  "got inf for class 1": np.array([0, 1e300, 0, 0, 0]),
  "all -inf": np.full(5, -np.inf),
}


@pytest.mark.parametrize("reason", WRONG_LOGITS)
def test_wrong_logits_are_refused(tmp_path, source, reason):
  rows = logits_rows(source)
  id = rows[9][0]
  rows[9] = (id, 0, {"logits": WRONG_LOGITS[reason]})
  with pytest.raises(ValueError, match=f"example id {id}, view 0.*{reason}"):
    imported(tmp_path, rows, source, TOP)


@pytest.mark.parametrize(
  "row, reason",
  [
    ((5.5, 0, {}), "rows: id"),
    ((5, 0), "mapping of arrays"),
    ((5, 0, {"logprobs": np.zeros(5)}), "'indices' and 'logprobs'"),
    ((1000, 0, {"logits": np.zeros(5)}), "example id 1000, view 0: expected one of the source"),
    ((5, 1, {"logits": np.zeros(5)}), "view from 0 to 0"),
  ],
)
def test_unknown_rows_are_refused(tmp_path, source, row, reason):
  with pytest.raises(ValueError, match=reason):
    imported(tmp_path, [*logits_rows(source), row], source)


def test_doubled_rows_are_refused(tmp_path, source):
  rows = logits_rows(source)
  with pytest.raises(ValueError, match=f"example id {rows[4][0]}, view 0.*twice"):
    imported(tmp_path, [*rows, rows[4]], source)


def test_lists_need_top_k(tmp_path, source):
  with pytest.raises(ValueError, match="TopK"):
    imported(tmp_path, list_rows(source), source)
  two = {"logits@2": TopK(2), "logits@3": TopK(3)}
  with pytest.raises(ValueError, match="TopK"):
    imported(tmp_path / "two", list_rows(source), source, two)


def test_renormalized_lists_are_warned_of(tmp_path, source):
  rows = list_rows(source)
  for _, _, lists in rows:
    lists["logprobs"] -= np.log(np.exp(lists["logprobs"]).sum())
  with pytest.warns(UserWarning, match=f"sum to 1 at .* of {ROWS} positions"):
    imported(tmp_path, rows, source, TOP)


def test_missing_rows_are_named_and_added_by_the_next_call(tmp_path, source):
  rows = list_rows(source)
  whole = imported(tmp_path / "whole", rows, source, TOP)
  missing = [rows.pop(id) for id in (50, 20, 3)]
  with pytest.raises(ValueError, match="3 are missing") as error:
    imported(tmp_path / "parts", rows, source, TOP)
  assert all(f"({id}, 0)" in str(error.value) for id, _, _ in missing)
  with pytest.raises(Incomplete):
    open_cache(tmp_path / "parts")
  cache = imported(tmp_path / "parts", missing, source, TOP)
  assert cache.check_checksums()["sha256"] == whole.check_checksums()["sha256"]


def test_an_interrupted_import_resumes_to_the_same_bytes(tmp_path, source, monkeypatch):
  monkeypatch.setattr(importer, "MAX_ROWS", 8)
  rows = list_rows(source)
  whole = imported(tmp_path / "whole", rows, source, TOP)

  def interrupted():
    yield from rows[:30]
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    imported(tmp_path / "stopped", interrupted(), source, TOP)
  with pytest.raises(Incomplete):
    open_cache(tmp_path / "stopped")
  asked = []

  def fill(missing):
    asked.extend(missing.ids)
    by_id = {id: row for id, *row in rows}
    return [(int(id), *by_id[id]) for id in missing.ids]

  cache = imported(tmp_path / "stopped", fill, source, TOP)
  assert set(asked) == {id for id, _, _ in rows[30:]}  # what was kept is not computed again
  assert cache.check_checksums()["sha256"] == whole.check_checksums()["sha256"]
  imported(tmp_path / "stopped", None, source, TOP)  # opened as it is


@pytest.mark.parametrize("damage", ["torn", "flipped"])
def test_damaged_rows_count_as_missing(tmp_path, source, damage):
  rows = list_rows(source)
  with pytest.raises(ValueError, match="1 are missing"):
    imported(tmp_path, rows[1:], source, TOP)
  [journal] = tmp_path.glob("rows-*")
  content = bytearray(journal.read_bytes())
  if damage == "torn":
    content = content[:-5]
  else:
    content[100] ^= 1
  journal.write_bytes(content)
  with pytest.raises(ValueError, match="2 are missing"):
    imported(tmp_path, [], source, TOP)
  assert len(imported(tmp_path, rows, source, TOP)) == ROWS


def test_rows_changed_under_the_import_are_found(tmp_path, source):
  rows = list_rows(source)

  def damaging():
    yield from rows[:-1]
    [journal] = tmp_path.glob("rows-*")
    with open(journal, "r+b") as file:
      file.seek(100)
      file.write(b"\xff\xff")
    yield rows[-1]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(importer, "MAX_ROWS", 1)
    with pytest.raises(CorruptCache, match="rows-"):
      imported(tmp_path, damaging(), source, TOP)


def test_rows_of_a_second_call_must_be_the_same(tmp_path, source):
  rows = list_rows(source)
  with pytest.raises(ValueError, match="missing"):
    imported(tmp_path, rows[1:], source, TOP)
  id, view, lists = rows[5]
  rows[5] = (id, view, lists | {"logprobs": lists["logprobs"] - 1e-3})
  with pytest.raises(ValueError, match=f"example id {id}, view 0.*earlier"):
    imported(tmp_path, rows, source, TOP)


def test_two_imports_do_not_share_a_folder(tmp_path, source):
  with Lease(tmp_path), pytest.raises(LeaseError):
    imported(tmp_path, list_rows(source), source, TOP)


def test_imports_into_object_stores(tmp_path, source):
  cache = imported(f"memory://{tmp_path}", list_rows(source), source, TOP)
  assert cache.check_checksums()["rows"] == ROWS


def test_identity_says_who_computed_the_rows(tmp_path, source):
  weights = tmp_path / "weights"
  weights.write_bytes(b"1")
  rows = list_rows(source)
  cache = imported(tmp_path / "cache", rows, source, TOP, identity=weights)
  assert cache.digest == imported(tmp_path / "cache", (), source, TOP, identity=[weights]).digest
  weights.write_bytes(b"2")
  with pytest.raises(Mismatch, match=r"teacher\.imported\.weights"):
    imported(tmp_path / "cache", rows, source, TOP, identity=weights)
  for identity in ("", " ", None, (), tmp_path / "absent", ["text"]):
    with pytest.raises(ValueError, match="identity"):
      imported(tmp_path / "other", rows, source, TOP, identity=identity)


def test_a_run_of_other_data_is_rejected(tmp_path, source):
  cache = imported(tmp_path, list_rows(source), source, TOP)
  changed = {name: np.array(x) for name, x in source.arrays.items()}
  changed["image"][3] += 1
  with pytest.raises(Mismatch, match="'image'"):
    check_run(cache, data.Source(changed, CLASSES, name="toy"))


def test_no_teacher_is_known(tmp_path, source):
  cache = imported(tmp_path, list_rows(source), source, TOP)
  with pytest.raises(ValueError, match="check_checksums"):
    verify(cache, None, source)
  with pytest.raises(Mismatch, match="imported"):
    check_teacher_weights(cache, linear().variables)


def test_arguments_are_checked(tmp_path, source):
  with pytest.raises(ValueError, match="outputs.*'hidden'"):
    imported(tmp_path, [], source, {"hidden": Dense()})
  with pytest.raises(ValueError, match="inputs.*did you mean 'image'"):
    imported(tmp_path, [], source, inputs=["imag"])
  with pytest.raises(ValueError, match="shape"):
    imported(tmp_path, [], {"x": np.ones((2, 2))})
  with pytest.raises(ValueError, match="num_views"):
    imported(tmp_path, [], source, num_views=2)
  with pytest.raises(ValueError, match="rows: expected .*None"):
    imported(tmp_path, None, source)


def test_rows_before_a_wrong_one_are_kept(tmp_path, source):
  rows = list_rows(source)
  wrong = (rows[30][0], 0, {"logits": np.zeros(1, np.float32)})
  with pytest.raises(ValueError, match="floating logits"):
    imported(tmp_path, [*rows[:30], wrong], source, TOP)
  assert len(imported(tmp_path, rows[30:], source, TOP)) == len(rows)


@pytest.mark.parametrize("rounding", [np.float64, np.float16])
def test_true_log_probabilities_of_labels_are_accepted(rounding):
  spec = row_checks.RowSpec((50, 300), 300, 8)
  sharpness = np.linspace(0.5, 20, 50)[:, None]
  logits = sharpness * np.random.default_rng(2).normal(size=spec.shape)
  lists = lists_of(logits, 8)
  log_probs = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
  for label in (
    lists["indices"][:, 0],
    lists["indices"][:, 7],
    np.arange(50),
    log_probs.argmin(-1),
  ):
    values = np.take_along_axis(log_probs, label[:, None], -1)[:, 0].astype(rounding)
    row_checks.check_row(spec, (7, 0, lists | {"label_logprobs": values}))
