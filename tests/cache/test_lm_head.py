"""Hidden states of a language model in a cache, its head beside them: the teacher itself, or refused."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fitting import fit_with
from language_models import LENGTH, VOCABULARY, language_model, made, rows

from distill_jax import losses, objectives, teachers
from distill_jax.cache import (
  CorruptCache,
  Dense,
  Incomplete,
  Mismatch,
  TopK,
  describe,
  estimate,
  open_cache,
  verify,
  write_cache,
)
from distill_jax.cache.teacher import lazy_logits, lm_head
from distill_jax.cache.teacher.lazy_logits import LazyLogits
from distill_jax.cache.teacher.predictor import with_cached_outputs
from distill_jax.distributed import sharding
from distill_jax.train import make_init, make_train_step

GOAL = objectives.weighted(soft=(1.0, objectives.tokens(losses.kl_divergence, temperature=2.0)))


@pytest.fixture
def source(rng):
  return rows(rng)


def written(folder, teacher, source, dtype="float32", **kept):
  return write_cache(
    folder, teacher, source, {"hidden": Dense(dtype), **kept}, batch_size=8, progress=False
  )


def trained(teacher, source, **settings):
  student = language_model(7, 4, whole=False)
  return fit_with(student, teacher, GOAL, optax.adam(1e-2), source, steps=6, batch_size=8, **settings).state.params


def largest_difference(a, b):
  return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


def test_a_run_from_the_cache_is_the_run_with_the_live_teacher(tmp_path, source):
  options = {"bias": True, "softcap": 30.0}
  teacher = language_model(1, **options)
  live = trained(teacher, source)
  exact = trained(written(tmp_path / "a", teacher, source), source)
  assert largest_difference(live, exact) == 0
  rounded = trained(written(tmp_path / "b", teacher, source, "int8"), source)
  assert 0 < largest_difference(live, rounded) < 0.02
  assert largest_difference(live, trained(language_model(2, **options), source)) > 0.02


def test_a_head_in_bfloat16_is_kept_as_it_is(tmp_path, source):
  teacher = teachers.with_dtype(language_model(1, bias=True, whole=False), dtype=jnp.bfloat16)
  cached = written(tmp_path, teacher, source, "bfloat16")
  kernel, bias = (np.asarray(teacher.variables.params[name]) for name in ("head", "bias"))
  (path,) = tmp_path.glob("head-*")
  data = path.read_bytes()
  assert data == kernel.tobytes() + bias.tobytes()
  assert path.name == f"head-{hashlib.sha256(data).hexdigest()[:32]}"
  held = open_cache(tmp_path).model.variables.params["head"]
  assert held["kernel"].dtype == held["bias"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(held["kernel"], kernel)
  np.testing.assert_array_equal(held["bias"], bias)
  assert largest_difference(trained(teacher, source), trained(cached, source)) == 0


def test_the_head_is_an_argument_of_the_step_and_never_in_its_program(tmp_path, source):
  cached = written(tmp_path, language_model(1), source)
  parts = language_model(7, 4), cached.model, GOAL, optax.sgd(0.1)
  batch = cached.add_columns({name: x[:8] for name, x in source.arrays.items()})
  state = make_init(*parts)(jax.random.key(0), batch)
  program = str(jax.make_jaxpr(make_train_step(*parts))(state, cached.model.variables, batch))
  assert not jax.make_jaxpr(make_train_step(*parts))(state, cached.model.variables, batch).consts
  assert f"f32[6,{VOCABULARY}]" in program
  with pytest.raises(ValueError, match="pass `Cache.model.variables`"):
    cached.model.apply({}, {}, batch, train=False, key=None)


def test_over_devices_the_head_is_spread_and_the_run_the_same(tmp_path, source, monkeypatch):
  teacher, mesh = language_model(1), sharding.make_mesh(2, 4)
  monkeypatch.setattr(sharding, "MIN_SIZE_TO_SHARD", 8)
  cached = written(tmp_path, teacher, source)
  rules = (
    ("here", jax.sharding.PartitionSpec()),
  )  # of the live teacher: the cache has no such array
  live, kept = (trained(t, source, mesh=mesh, teacher_rules=rules) for t in (teacher, cached))
  assert largest_difference(live, kept) < 1e-6


def test_outputs_without_a_head_keep_none(tmp_path, source):
  plain = language_model(1)

  def apply(*args, **kwargs):
    outputs, state = plain.apply(*args, **kwargs)
    return {"hidden": outputs["hidden"]}, state

  cached = written(tmp_path / "none", plain._replace(apply=apply), source)
  assert cached.head is None and not list((tmp_path / "none").glob("head-*"))
  top = write_cache(
    tmp_path / "top", plain, source, {"logits": TopK(2)}, batch_size=8, progress=False
  )
  assert top.head is None and "head" not in top.manifest.identity["teacher"]


# refused


def changed(path, at, value):
  data = bytearray(path.read_bytes())
  data[at] ^= value
  path.write_bytes(bytes(data))


def test_a_damaged_head_is_refused_and_written_anew(tmp_path, source):
  written(tmp_path, language_model(1), source)
  (path,) = tmp_path.glob("head-*")
  whole = path.read_bytes()
  for broken in (whole[:-1], whole + b"\0", b"", bytes([whole[0] ^ 1]) + whole[1:]):
    path.write_bytes(broken)
    for use in (lambda c: c.model, lambda c: c.check_checksums(), lambda c: trained(c, source)):
      with pytest.raises(
        CorruptCache, match=f"{path.name} is damaged: it is not the head .* Delete it and run"
      ):
        use(open_cache(tmp_path))
  path.unlink()
  with pytest.raises(
    Incomplete, match=f"{path.name}, the teacher's head, is missing. Run the cache stage again"
  ):
    open_cache(tmp_path)
  written(tmp_path, language_model(1), source)
  assert path.read_bytes() == whole and open_cache(tmp_path).check_checksums()["rows"] == len(source)


def test_a_head_that_goes_while_a_cache_is_open_is_noticed(tmp_path, source):
  cached = open_cache(written(tmp_path, language_model(1), source).store.url)
  next(tmp_path.glob("head-*")).unlink()
  with pytest.raises(Incomplete, match="the teacher's head, is missing"):
    cached.check_checksums()


@pytest.mark.parametrize(
  ("options", "field"),
  [
    ({"softcap": 20.0}, "teacher.head.softcap: 30.0 in the cache, 20.0 wanted"),
    ({"bias": False}, "teacher.head.bias.dtype: 'float32' in the cache, '(absent)' wanted"),
  ],
)
def test_another_head_is_another_teacher(tmp_path, source, options, field):
  own = {"softcap": 30.0, "bias": True}
  cached = written(tmp_path, language_model(1, **own), source)
  other = language_model(1, **own | options)
  with pytest.raises(Mismatch) as caught:
    written(tmp_path, other, source)
  assert field in str(caught.value)
  with pytest.raises(Mismatch, match="teacher.head"):
    check_teacher(cached, other, other.variables, {"hidden": Dense("float32")}, source.arrays)
  params = language_model(1, **own).variables.params
  moved = language_model(1, **own)._replace(
    variables=other.variables._replace(params=params | {"head": params["head"] + 1})
  )
  with pytest.raises(Mismatch, match=r"teacher.head.sha256: '[0-9a-f]{32}' in the cache"):
    written(tmp_path, moved, source)


def test_the_head_of_another_cache_in_its_place_is_refused(tmp_path, source):
  written(tmp_path / "one", language_model(1), source)
  written(tmp_path / "two", language_model(2), source)
  (one,), (two,) = ((tmp_path / name).glob("head-*") for name in ("one", "two"))
  shutil.copy(two, one)
  with pytest.raises(CorruptCache, match="it is not the head that was written"):
    open_cache(tmp_path / "one").model  # noqa: B018


def test_a_head_whose_parts_do_not_fit_is_refused(tmp_path, source):
  teacher = language_model(1, bias=True)
  short = teacher.variables.params | {"bias": jnp.zeros(3)}
  with pytest.raises(
    ValueError, match=r"the teacher's 'head' has a kernel \(6, 257\) and a bias \(3,\)"
  ):
    written(tmp_path, teacher._replace(variables=teacher.variables._replace(params=short)), source)


# looked at


def test_verify_compares_hidden_states_and_what_the_head_makes_of_them(
  tmp_path, source, monkeypatch
):
  monkeypatch.setattr(lazy_logits, "CHUNK_BYTES", 4 * 8 * VOCABULARY * 3)
  teacher = language_model(1, softcap=30.0)
  found = verify(written(tmp_path, teacher, source, "float16"), teacher, source, 16, batch_size=8)[
    "hidden"
  ]
  assert (found.rows, found.difference, found.top1) == (16, 0, 1) and abs(found.kl) < 1e-6
  params = teacher.variables.params
  moved = teacher._replace(
    variables=teacher.variables._replace(params=params | {"head": params["head"][:, ::-1]})
  )
  batch = {"tokens": source.arrays["tokens"]}
  hidden = teacher.apply(*teacher.variables, batch, train=False, key=None)[0]["hidden"]
  a, b = (
    jax.nn.log_softmax(made(hidden, t.variables.params["head"], None, 30.0))
    for t in (moved, teacher)
  )
  found = verify(open_cache(tmp_path), moved, source, len(source), batch_size=8)["hidden"]
  assert found.difference == 0 and found.kl == pytest.approx(
    float((jnp.exp(a) * (a - b)).sum(-1).mean()), rel=1e-4
  )
  assert found.top1 < 0.5


def test_what_the_cache_says_of_itself(tmp_path, source):
  cached = written(
    tmp_path, language_model(1, softcap=30.0), source, "float16", **{"logits@top4": TopK(4)}
  )
  text = describe(cached)
  assert f"and the teacher's head, {4 * 6 * VOCABULARY:,} bytes" in text
  assert (
    "teacher.head.softcap: 30.0" in text and f"teacher.head.kernel.shape: [6, {VOCABULARY}]" in text
  )
  assert "the teacher's largest probability at temperature 1" in text
  record = cached.manifest.header(0).record_dtype
  assert record.fields["hidden.values"][0].itemsize == 2 * 6 * LENGTH


def test_an_estimate_takes_some_of_the_tokens(source):
  teacher = language_model(1)
  outputs = teacher.apply(
    *teacher.variables, {"tokens": source.arrays["tokens"]}, train=False, key=None
  )[0]
  (found,) = estimate(LazyLogits(outputs["hidden"], outputs["head"]), codecs=[TopK(3)])
  hidden = np.asarray(outputs["hidden"]).reshape(-1, 6)
  step = -(-len(hidden) // 512)
  p = np.asarray(jax.nn.softmax(made(hidden[::step], outputs["head"][0])), np.float64)
  assert step > 1 or len(hidden) <= 512
  assert (
    found.mass[0] == pytest.approx(np.sort(p)[:, -3:].sum(-1).mean(), rel=1e-5)
    and found.bytes == 4 + 4 + 8
  )


def test_a_stand_in_has_the_shapes_of_the_cache(tmp_path, source):
  teacher, kept = language_model(1, softcap=30.0), {"hidden": Dense("float16")}
  batch = {"id": source.ids[:8], "tokens": source.arrays["tokens"][:8]}
  shown = jax.eval_shape(
    lambda b: with_cached_outputs(teacher, kept).apply(
      *teacher.variables, b, train=False, key=None
    )[0],
    batch,
  )
  cached = written(tmp_path, teacher, source, "float16")
  said = cached.model.apply(*cached.model.variables, cached.add_columns(batch), train=False, key=None)[0]
  assert jax.tree.map(jnp.shape, (shown["hidden"], shown["head"])) == jax.tree.map(
    jnp.shape, (said["hidden"], said["head"])
  )


def test_the_manifest_is_plain(tmp_path, source):
  written(tmp_path, language_model(1), source)
  body = json.loads((tmp_path / "manifest.json").read_text())["body"]
  head = body["identity"]["teacher"]["head"]
  assert head == {
    "kernel": {"dtype": "float32", "shape": [6, VOCABULARY]},
    "softcap": None,
    "sha256": head["sha256"],
  }
  assert lm_head.head_bytes(head) == next(tmp_path.glob("head-*")).stat().st_size
