"""Checks caches of a language model's hidden states, with its head next to them."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fitting import fit_with
from language_models import LENGTH, VOCABULARY, language_model, logits_of, token_rows, with_params
from toys import largest_difference

from distill_jax import losses, objectives, teachers
from distill_jax.cache import (
  CorruptCache,
  Dense,
  Incomplete,
  Mismatch,
  TopK,
  check_teacher,
  describe,
  estimate,
  open_cache,
  verify,
  write_cache,
)
from distill_jax.cache.codecs import estimates
from distill_jax.cache.teacher import lazy_logits, lm_head
from distill_jax.cache.teacher.lazy_logits import LazyLogits
from distill_jax.cache.teacher.predictor import with_cached_outputs
from distill_jax.distributed import partition, sharding
from distill_jax.train import make_init, make_train_step

OBJECTIVE = objectives.weighted(
  soft=(1.0, objectives.tokens(losses.kl_divergence, temperature=2.0))
)


@pytest.fixture(scope="module")
def source():
  return token_rows(np.random.default_rng(0))


def write(folder, teacher, source, dtype="float32", **outputs):
  outputs = {"hidden": Dense(dtype), **outputs}
  return write_cache(folder, teacher, source, outputs, batch_size=8, progress=False)


@pytest.fixture(scope="module")
def cached(tmp_path_factory, source):
  return write(tmp_path_factory.mktemp("head") / "cache", language_model(1), source)


@pytest.fixture
def copy(tmp_path, cached):
  """The folder of a copy of `cached`."""
  return shutil.copytree(cached.store.url, tmp_path / "copy")


def train(teacher, source, **settings):
  settings = dict(steps=6, batch_size=8) | settings
  student = language_model(7, 4, exact=False)._replace(variables=None)
  return fit_with(student, teacher, OBJECTIVE, optax.adam(1e-2), source, **settings)


def test_student_from_cache_matches_live_teacher(tmp_path, source):
  options = {"bias": True, "softcap": 30.0}
  teacher = language_model(1, **options)
  live = train(teacher, source)
  exact = train(write(tmp_path, teacher, source), source)
  assert largest_difference(live, exact) == 0
  losses = [line["loss"] for line in live.history if line["phase"] == "train"]
  assert losses[-1] > 0.1  # the one term compares with the teacher


def test_a_bfloat16_head_is_stored_unchanged(tmp_path, source):
  teacher = teachers.with_dtype(language_model(1, bias=True, exact=False), dtype=jnp.bfloat16)
  cached = write(tmp_path, teacher, source, "bfloat16")
  kernel, bias = (np.asarray(teacher.variables.params[name]) for name in ("head", "bias"))
  (path,) = tmp_path.glob("head-*")
  data = path.read_bytes()
  assert data == kernel.tobytes() + bias.tobytes()
  assert path.name == f"head-{hashlib.sha256(data).hexdigest()[:32]}"
  head = open_cache(tmp_path).model.variables.params["head"]
  assert head["kernel"].dtype == head["bias"].dtype == jnp.bfloat16
  np.testing.assert_array_equal(head["kernel"], kernel)
  np.testing.assert_array_equal(head["bias"], bias)
  batch = {"id": source.ids[:8], "tokens": source.arrays["tokens"][:8]}
  live = teacher.apply(*teacher.variables, batch, train=False, key=None)[0]["hidden"]
  columns = cached.add_columns(batch)
  stored = cached.model.apply(*cached.model.variables, columns, train=False, key=None)[0]["hidden"]
  assert stored.dtype == live.dtype == jnp.bfloat16
  np.testing.assert_array_equal(stored, live)


def test_the_head_is_an_argument_of_the_step(cached, source):
  parts = language_model(7, 4), cached.model, OBJECTIVE, optax.sgd(0.1)
  batch = cached.add_columns({name: x[:8] for name, x in source.arrays.items()})
  state = jax.eval_shape(make_init(*parts), jax.random.key(0), batch)
  program = jax.make_jaxpr(make_train_step(*parts))(state, cached.model.variables, batch)
  assert not program.consts
  assert f"f32[6,{VOCABULARY}]" in str(program)
  with pytest.raises(ValueError, match=r"params: .*Cache\.model\.variables"):
    cached.model.apply({}, {}, batch, train=False, key=None)


def test_a_sharded_head_gives_the_same_run(cached, source, monkeypatch):
  mesh = sharding.make_mesh(2, 4)
  monkeypatch.setattr(partition, "MIN_SIZE_TO_SHARD", 8)
  # A rule of the live teacher: the cache has no such array.
  rules = (("token", jax.sharding.PartitionSpec()),)
  live, from_cache = (
    train(teacher, source, mesh=mesh, teacher_rules=rules)
    for teacher in (language_model(1), cached)
  )
  assert largest_difference(live, from_cache) < 1e-6


def test_outputs_without_a_head_store_none(tmp_path, source):
  teacher = language_model(1)

  def apply(*args, **kwargs):
    outputs, state = teacher.apply(*args, **kwargs)
    return {"hidden": outputs["hidden"]}, state

  cached = write(tmp_path / "none", teacher._replace(apply=apply), source)
  assert cached.head is None and not list((tmp_path / "none").glob("head-*"))
  outputs = {"logits": TopK(2)}
  top = write_cache(tmp_path / "top", teacher, source, outputs, batch_size=8, progress=False)
  assert top.head is None and "head" not in top.manifest.identity["teacher"]


# rejected


def test_a_corrupt_head_is_rejected_and_written_again(copy, source):
  (path,) = copy.glob("head-*")
  data = path.read_bytes()
  for corrupt in (data[:-1], data + b"\0", b"", bytes([data[0] ^ 1]) + data[1:]):
    path.write_bytes(corrupt)
    for use in (lambda c: c.model, lambda c: c.check_checksums()):
      with pytest.raises(CorruptCache, match=path.name):
        use(open_cache(copy))
  path.unlink()
  with pytest.raises(Incomplete, match=path.name):
    open_cache(copy)
  write(copy, language_model(1), source)
  assert path.read_bytes() == data and open_cache(copy).check_checksums()["rows"] == len(source)


def test_a_head_that_is_removed_later_is_noticed(copy):
  cached = open_cache(copy)
  next(copy.glob("head-*")).unlink()
  with pytest.raises(Incomplete, match="head-"):
    cached.check_checksums()


def test_another_head_is_another_teacher(tmp_path, source):
  options = {"softcap": 30.0, "bias": True}
  teacher = language_model(1, **options)
  cached = write(tmp_path, teacher, source)
  for changed, match in (
    ({"softcap": 20.0}, r"teacher\.head\.softcap: expected 20\.0, got 30\.0"),
    ({"bias": False}, r"teacher\.head\.bias\.dtype: .*absent"),
  ):
    other = language_model(1, **options | changed)
    with pytest.raises(Mismatch, match=match):
      write(tmp_path, other, source)
    with pytest.raises(Mismatch, match=r"teacher\.head"):
      check_teacher(cached, other, other.variables, {"hidden": Dense("float32")}, source.arrays)
  moved = with_params(teacher, head=teacher.variables.params["head"] + 1)
  with pytest.raises(Mismatch, match=r"teacher\.head\.sha256"):
    write(tmp_path, moved, source)


def test_the_head_of_another_cache_is_rejected(tmp_path, copy, source):
  write(tmp_path / "other", language_model(2), source)
  (path,), (other,) = (folder.glob("head-*") for folder in (copy, tmp_path / "other"))
  shutil.copy(other, path)
  with pytest.raises(CorruptCache, match=path.name):
    open_cache(copy).head  # noqa: B018


def test_a_bias_that_does_not_fit_is_rejected(tmp_path, source):
  teacher = with_params(language_model(1, bias=True), bias=jnp.zeros(3))
  with pytest.raises(ValueError, match=r"head: .*\(6, 257\) and \(3,\)"):
    write(tmp_path, teacher, source)


# inspected


def test_verify_compares_hidden_states_and_their_logits(tmp_path, source, monkeypatch):
  monkeypatch.setattr(lazy_logits, "CHUNK_BYTES", 4 * 8 * VOCABULARY * 3)
  teacher = language_model(1, softcap=30.0)
  cached = write(tmp_path, teacher, source, "float16")
  same = verify(cached, teacher, source, 16, batch_size=8)["hidden"]
  assert (same.rows, same.difference, same.top1) == (16, 0, 1) and abs(same.kl) < 1e-6
  kernel = teacher.variables.params["head"]
  moved = with_params(teacher, head=kernel[:, ::-1])
  batch = {"tokens": source.arrays["tokens"]}
  hidden = teacher.apply(*teacher.variables, batch, train=False, key=None)[0]["hidden"]
  a, b = (
    jax.nn.log_softmax(logits_of(hidden, head, None, 30.0)) for head in (kernel[:, ::-1], kernel)
  )
  kl = float((jnp.exp(a) * (a - b)).sum(-1).mean())
  other = verify(cached, moved, source, len(source), batch_size=8)["hidden"]
  assert other.difference == 0 and other.kl == pytest.approx(kl, rel=1e-4)
  assert other.top1 < 0.5


def test_describe_has_the_head(tmp_path, source):
  teacher = language_model(1, softcap=30.0)
  cached = write(tmp_path, teacher, source, "float16", **{"logits@top4": TopK(4)})
  text = describe(cached)
  assert f"and the teacher's head, {4 * 6 * VOCABULARY:,} bytes" in text
  assert "teacher.head.softcap: 30.0" in text
  assert f"teacher.head.kernel.shape: [6, {VOCABULARY}]" in text
  assert "largest probability at temperature 1" in text
  record = cached.manifest.header(0).record_dtype
  assert record.fields["hidden.values"][0].itemsize == 2 * 6 * LENGTH


def test_estimate_uses_some_of_the_tokens(monkeypatch, source):
  monkeypatch.setattr(estimates, "MAX_TOKENS", 100)
  monkeypatch.setattr(estimates, "_measure", lambda codec, teacher, *_: teacher)
  teacher = language_model(1)
  batch = {"tokens": source.arrays["tokens"]}
  outputs = teacher.apply(*teacher.variables, batch, train=False, key=None)[0]
  (logits,) = estimate(LazyLogits(outputs["hidden"], outputs["head"]), codecs=[TopK(3)])
  hidden = np.asarray(outputs["hidden"]).reshape(-1, 6)
  stride = -(-len(hidden) // 100)
  assert stride > 1
  np.testing.assert_array_equal(logits, logits_of(hidden[::stride], outputs["head"][0]))


def test_a_stand_in_has_the_shapes_of_the_cache(cached, source):
  teacher, outputs = language_model(1), {"hidden": Dense("float32")}
  batch = {"id": source.ids[:8], "tokens": source.arrays["tokens"][:8]}
  stand_in = with_cached_outputs(teacher, outputs)
  shapes = jax.eval_shape(
    lambda batch: stand_in.apply(*teacher.variables, batch, train=False, key=None)[0], batch
  )
  columns = cached.add_columns(batch)
  decoded = cached.model.apply(*cached.model.variables, columns, train=False, key=None)[0]
  for name in ("hidden", "head"):
    assert jax.tree.map(jnp.shape, shapes[name]) == jax.tree.map(jnp.shape, decoded[name])


def test_the_manifest_is_plain_json(copy):
  body = json.loads((copy / "manifest.json").read_text())["body"]
  head = body["identity"]["teacher"]["head"]
  assert head == {
    "kernel": {"dtype": "float32", "shape": [6, VOCABULARY]},
    "softcap": None,
    "sha256": head["sha256"],
  }
  assert lm_head.head_bytes(head) == next(copy.glob("head-*")).stat().st_size
