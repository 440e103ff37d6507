"""Tests teachers that are functions of numpy arrays: caches, live steps, bad outputs."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import cache, data, losses, objectives, teachers
from distill_jax.cache import writer
from distill_jax.cache.codecs.dense_codec import Dense
from distill_jax.distributed import sharding
from distill_jax.models import from_nnx
from distill_jax.models.zoo.mlp import MLP
from distill_jax.teachers.host_function import raising_host_errors
from distill_jax.train import StepOptions, fit
from distill_jax.types import Variables

ROWS, FEATURES, CLASSES, BATCH = 60, 12, 5, 16
KERNEL = np.random.default_rng(1).normal(size=(FEATURES, CLASSES)).astype(np.float32)
FLOAT32 = {"logits": Dense("float32")}


def logits(images):
  # Row by row: BLAS adds in another order for another number of rows.
  return np.stack([row.reshape(-1) @ KERNEL for row in images])


class Teacher:
  """A function of numpy arrays that records its calls."""

  def __init__(self, change=lambda outputs, call: outputs):
    self.change = change
    self.batches = []
    self.threads = set()

  def __call__(self, batch):
    self.batches.append(batch["image"])
    self.threads.add(threading.get_ident())
    outputs = {"logits": logits(batch["image"])}
    return self.change(outputs, len(self.batches) - 1)

  @property
  def real_batches(self):
    """Those of examples: neither zeros nor the 32 and 8 rows of the checks before them."""
    return [x for x in self.batches if len(x) == BATCH]


@pytest.fixture
def source(rng):
  ids = rng.permutation(200)[:ROWS]
  images = rng.normal(size=(ROWS, FEATURES)).astype(np.float32)
  return data.Source({"id": ids, "image": images, "label": ids % CLASSES}, CLASSES, name="rows")


@pytest.fixture
def small_shards(monkeypatch):
  """Shards of one batch: four for 60 rows."""
  monkeypatch.setattr(writer, "SHARD_BATCHES", 1)


def written(folder, predict, source, outputs=FLOAT32, *, identity="test", **settings):
  teacher = teachers.host(predict, identity=identity)
  return cache.write_cache(
    folder, teacher, source, outputs, batch_size=BATCH, progress=False, **settings
  )


def stored(outputs, ids, name="logits"):
  return outputs.add_columns({"id": ids})[f"teacher/{name}.values"]


def wrong_at_third(change):
  """Returns a teacher whose outputs change at the third batch of examples."""

  def changed(outputs, call):
    return change(outputs["logits"]) if len(predict.real_batches) == 3 else outputs

  predict = Teacher(changed)
  return predict


# Caches


def test_cached_rows_equal_the_function(tmp_path, source):
  predict = Teacher()
  outputs = written(tmp_path, predict, source)
  np.testing.assert_array_equal(stored(outputs, source.ids), logits(source.arrays["image"]))
  # Every row once; the last batch repeats its last row.
  assert len(predict.real_batches) == 4
  agreement = cache.verify(
    outputs, teachers.host(predict, identity="test"), source, ROWS, batch_size=BATCH
  )
  assert agreement["logits"].rows == ROWS and agreement["logits"].difference == 0
  cache.check_teacher(
    outputs,
    teachers.host(predict, identity="test"),
    teachers.host(predict, identity="test").variables,
    FLOAT32,
    source.arrays,
  )


def test_a_thread_computes_the_next_batch_while_a_shard_is_written(
  tmp_path, source, small_shards, monkeypatch
):
  started = threading.Semaphore(0)
  predict = Teacher(lambda outputs, call: started.release() or outputs)
  write_shard = writer.fill_missing.__globals__["shards"].write_shard

  def write_after_next(store, manifest, number, *arguments):
    # Zeros, two checks, the batches up to this one, and the next one.
    for _ in range(1 + (number == 0) * 4 if number < 3 else 0):
      assert started.acquire(timeout=20), "no batch is computed while a shard is written"
    return write_shard(store, manifest, number, *arguments)

  monkeypatch.setattr(writer.fill_missing.__globals__["shards"], "write_shard", write_after_next)
  assert len(written(tmp_path, predict, source)) == ROWS
  assert threading.get_ident() in predict.threads and len(predict.threads) > 1


def test_an_interrupted_cache_computes_the_rest_only(tmp_path, source, small_shards):
  written(tmp_path / "full", Teacher(), source)

  def fail(x):
    raise ConnectionError("the server is gone")

  with pytest.raises(ConnectionError, match="server is gone") as caught:
    written(tmp_path / "stopped", wrong_at_third(fail), source)
  third = np.sort(source.ids)[2 * BATCH : 3 * BATCH]
  assert f"ids {third[0]}, {third[1]}" in caught.value.__notes__[0]
  again = Teacher()
  outputs = written(tmp_path / "stopped", again, source)
  assert len(again.real_batches) == 2
  np.testing.assert_array_equal(stored(outputs, source.ids), logits(source.arrays["image"]))
  for path in (tmp_path / "full").glob("shard-*"):
    assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes()


def test_augmented_views_reach_the_function(tmp_path, source):
  def augment(batch):
    return {**batch, "image": batch["image"] * (1.0 + batch["view"][:, None])}

  outputs = written(tmp_path, Teacher(), source, augment=augment, num_views=2)
  batch = {"id": source.ids, "view": np.ones(ROWS, np.int32)}
  expected = logits(2 * source.arrays["image"])
  np.testing.assert_array_equal(outputs.add_columns(batch)["teacher/logits.values"], expected)


def test_several_outputs_and_codecs_are_stored_by_name(tmp_path, source):
  def predict(batch):
    values = logits(batch["image"])
    hidden = {"hidden": batch["image"], "positive": batch["image"] > 0}
    # Their order changes from call to call.
    return hidden | {"logits": values} if len(values) % 3 else {"logits": values} | hidden

  codecs = {"hidden": Dense("float32"), "logits@top": cache.TopK(2), "logits": Dense("float32")}
  outputs = written(tmp_path, predict, source, codecs)
  np.testing.assert_array_equal(stored(outputs, source.ids, "hidden"), source.arrays["image"])
  top = outputs.decode("logits@top", outputs.add_columns({"id": source.ids}))
  expected = logits(source.arrays["image"]).argsort(-1)[:, ::-1][:, :2]
  np.testing.assert_array_equal(top.indices, expected)


def test_inputs_select_what_the_function_gets(tmp_path, source):
  seen = set()

  def predict(batch):
    seen.update(batch)
    return {"logits": logits(batch["image"])}

  source = data.Source({**source.arrays, "boxes": np.ones((ROWS, 2), np.float32)}, CLASSES)
  teacher = teachers.host(predict, identity="a", inputs="image")
  outputs = cache.write_cache(tmp_path, teacher, source, FLOAT32, batch_size=8, progress=False)
  assert seen == {"image"}
  # Another entry may change, as the teacher does not read it.
  assert set(outputs.manifest.identity["data"]["inputs"]) == {"image"}
  batch = {**source.arrays, "teacher/x": np.ones(ROWS), "where": np.ones(ROWS, bool)}
  teacher = teachers.host(predict, identity="a")
  teacher.apply(*teacher.variables, batch, train=False, key=None)
  assert seen == {"image", "boxes"}


# Identity


def test_caches_of_another_identity_are_rejected(tmp_path, source):
  files = [tmp_path / "weights", tmp_path / "more"]
  for file in files:
    file.write_bytes(b"weights")
  identities = ["test", files[0], files, "test 2"]
  written(tmp_path / "cache", Teacher(), source, identity="test")
  for identity in identities[1:]:
    with pytest.raises(cache.Mismatch, match=r"teacher\.weights"):
      written(tmp_path / "cache", Teacher(), source, identity=identity)

  def digest(identity):
    return teachers.host(logits, identity=identity).variables.state["identity"].tobytes()

  assert len({digest(identity) for identity in identities}) == 4
  before = digest(files)
  files[1].write_bytes(b"other weights")
  assert digest(files) != before
  moved = files[0].rename(tmp_path / "moved")
  assert digest([moved]) == digest(moved)


@pytest.mark.parametrize("identity", ["", " ", None, [], 3, ["weights.pt"]])
def test_unusable_identity_is_rejected(identity):
  with pytest.raises(ValueError, match=r"identity: expected .* got"):
    teachers.host(logits, identity=identity)


# Bad outputs


class Tensor:
  __module__ = "torch"


@pytest.mark.parametrize(
  ("change", "error"),
  [
    (lambda x: {"logits": x[:-1]}, r"expected 16 rows in 'logits'.* got the shape \[15, 5\]"),
    (lambda x: {"logits": x.astype(np.float64)}, r"got float64 as 'logits'.*astype\(np.float32\)"),
    (lambda x: {"logits": x.astype(np.float16)}, r"expected .*float32\[16,5\].*got.*float16"),
    (lambda x: {"logits": x[:, :4]}, r"expected .*float32\[16,5\].*got.*float32\[16,4\]"),
    (lambda x: {"logit": x}, r"expected .*'logits': .*got.*'logit': "),
    (lambda x: {"logits": x, "more": x}, r"got.*'more': "),
    (lambda x: {"logits": Tensor()}, r"torch\.Tensor as 'logits'.*numpy\(\)"),
    (lambda x: {"logits": x.tolist()}, r"builtins\.list as 'logits'.*asarray"),
    (lambda x: {"logits": x[0, 0]}, r"numpy\.float32 as 'logits'"),
    (lambda x: {"logits": x.astype(str)}, r"got <U\d+ as 'logits'"),
    (lambda x: x, r"expected a dict.*got ndarray"),
    (lambda x: {}, r"expected a dict.*got dict without entries"),
    (lambda x: None, r"expected a dict.*got None"),
  ],
)
def test_other_outputs_in_a_later_batch_are_rejected(tmp_path, source, small_shards, change, error):
  with pytest.raises(ValueError, match=f"predict: .*{error}") as caught:
    written(tmp_path, wrong_at_third(change), source)
  assert f"ids {np.sort(source.ids)[2 * BATCH]}" in caught.value.__notes__[0]
  # What came before is stored, and the rest not.
  assert len(list(tmp_path.glob("shard-*"))) == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_name_their_example(tmp_path, source, value):
  def change(x):
    x[5, 2] = value
    return {"logits": x}

  with pytest.raises(ValueError, match=rf"example id {np.sort(source.ids)[37]}.*NaN or \+inf"):
    written(tmp_path, wrong_at_third(change), source)


def test_probabilities_are_rejected(tmp_path, source):
  predict = Teacher(lambda outputs, call: {"logits": np.full_like(outputs["logits"], 0.2)})
  with pytest.raises(ValueError, match="probabilities"):
    written(tmp_path, predict, source)


def test_errors_on_zeros_and_in_checks_keep_their_type(tmp_path, source):
  def fail(batch):
    raise KeyError("pixels")

  with pytest.raises(KeyError, match="pixels") as caught:
    written(tmp_path, fail, source)
  assert "float32[2,12]" in caught.value.__notes__[0]

  def fail_on_examples(batch):
    if batch["image"].any():
      raise KeyError("pixels")
    return {"logits": logits(batch["image"])}

  with pytest.raises(KeyError, match="pixels"):
    written(tmp_path, fail_on_examples, source)


def test_no_entries_and_no_function_are_rejected(source):
  teacher = teachers.host(Teacher(), identity="a", inputs=())
  with pytest.raises(ValueError, match="inputs: expected at least one entry"):
    teacher.apply(*teacher.variables, source.arrays, train=False, key=None)
  with pytest.raises(ValueError, match="predict: expected a function"):
    teachers.host(np.ones(3), identity="a")


# Live


def test_rows_are_right_under_jit_on_8_devices(source):
  predict = Teacher()
  teacher = teachers.host(predict, identity="a")
  rows = sharding.row_sharding(sharding.data_mesh())
  batch = {name: x[:16] for name, x in source.arrays.items()}

  @jax.jit
  def apply(variables, batch):
    return teacher.apply(*variables, batch, train=False, key=None)[0]["logits"]

  result = apply(teacher.variables, jax.device_put(batch, rows))
  np.testing.assert_array_equal(result, logits(batch["image"]))
  # Once for zeros, and once for all devices.
  assert [len(x) for x in predict.batches] == [2, 16]
  other = {**batch, "image": -batch["image"]}
  np.testing.assert_array_equal(
    apply(teacher.variables, jax.device_put(other, rows)), logits(-batch["image"])
  )


def test_accelerators_use_a_pure_callback(source, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

  def fail(x):
    raise ConnectionError("the server is gone")

  teacher = teachers.host(wrong_at_third(fail), identity="a")
  batch = {name: x[:BATCH] for name, x in source.arrays.items()}

  @jax.jit
  def apply(batch):
    return teacher.apply(*teacher.variables, batch, train=False, key=None)[0]["logits"]

  assert "pure_callback" in str(jax.make_jaxpr(apply)(batch))
  np.testing.assert_array_equal(apply(batch), logits(batch["image"]))
  np.testing.assert_array_equal(apply(batch), logits(batch["image"]))
  with pytest.raises(ConnectionError, match="server is gone"):
    with raising_host_errors():
      apply(batch).block_until_ready()


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.filterwarnings("ignore:teacher. expected one that the device computes:UserWarning")
def test_student_of_a_live_teacher_equals_one_from_its_cache(tmp_path, source, microbatches):
  student = from_nnx(lambda rngs: MLP(FEATURES, (8,), CLASSES, rngs=rngs))
  soft = objectives.weighted(soft=(1.0, objectives.logits(losses.kl_divergence)))
  settings = dict(steps=3, batch_size=BATCH, step=StepOptions(microbatches=microbatches))
  results = [
    fit(student, teacher, soft, optax.adam(0.1), source, **settings)
    for teacher in (
      teachers.host(Teacher(), identity="test"),
      written(tmp_path, Teacher(), source),
    )
  ]
  live, cached = (jax.tree.leaves(result.state.params) for result in results)
  for a, b in zip(live, cached, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_step_of_a_live_teacher_warns_and_its_error_keeps_its_type(source):
  def fail(x):
    raise ConnectionError("the server is gone")

  student = from_nnx(lambda rngs: MLP(FEATURES, (8,), CLASSES, rngs=rngs))
  soft = objectives.weighted(soft=(1.0, objectives.logits(losses.kl_divergence)))
  teacher = teachers.host(wrong_at_third(fail), identity="a")
  with pytest.warns(UserWarning, match=r"cache\.write_cache"):
    with pytest.raises(ConnectionError, match="server is gone") as caught:
      fit(student, teacher, soft, optax.adam(0.1), source, steps=9, batch_size=BATCH)
  assert "example ids" in caught.value.__notes__[0]


def test_no_gradient_passes_through(source):
  teacher = teachers.host(Teacher(), identity="a")
  image = jnp.asarray(source.arrays["image"][:2])

  def loss(scale):
    outputs, _ = teacher.apply(*teacher.variables, {"image": scale * image}, train=False, key=None)
    return (scale * outputs["logits"]).sum()

  np.testing.assert_allclose(
    jax.grad(loss)(2.0), 2 * logits(source.arrays["image"][:2]).sum(), rtol=1e-5
  )


def test_other_transformations_of_a_teacher_call_it(source):
  teacher = teachers.host(Teacher(), identity="a")
  both = teachers.ensemble([teacher, teachers.host(Teacher(), identity="b")], mean="logits")
  selected = teachers.select_classes(both, (3, 0), output="logits")
  batch = {"image": source.arrays["image"]}
  outputs, _ = jax.jit(lambda v, b: selected.apply(*v, b, train=False, key=None))(
    selected.variables, batch
  )
  np.testing.assert_allclose(outputs["logits"], logits(batch["image"])[:, [3, 0]], rtol=1e-6)
  assert isinstance(teacher.init(jax.random.key(0), batch), Variables)


def test_outputs_in_reused_memory_are_stored(tmp_path, source, small_shards):
  memory = np.zeros((64, CLASSES), np.float32)

  def predict(batch):
    rows = len(batch["image"])
    memory[:rows] = logits(batch["image"])
    return {"logits": memory[:rows]}

  outputs = written(tmp_path / "cache", predict, source)
  np.testing.assert_array_equal(
    stored(outputs, source.ids), logits(source.arrays["image"][: len(source.ids)])
  )


def test_an_empty_batch_has_empty_outputs():
  teacher = teachers.host(Teacher(), identity="a")
  outputs = teacher.apply.call({"image": np.zeros((0, FEATURES), np.float32)}, [])
  assert outputs["logits"].shape == (0, CLASSES) and outputs["logits"].dtype == np.float32


def test_predict_may_use_jax(tmp_path, source):
  def predict(batch):
    return {"logits": np.asarray(jnp.asarray(batch["image"]) @ KERNEL)}

  outputs = written(tmp_path / "cache", predict, source)
  np.testing.assert_allclose(
    stored(outputs, source.ids), source.arrays["image"] @ KERNEL, rtol=1e-5, atol=1e-5
  )


def test_predict_may_write_to_what_it_gets(tmp_path, source):
  def predict(batch):
    batch["image"] += 1
    return {"logits": logits(batch["image"])}

  # The augmented batch comes from JAX, whose arrays are read-only.
  outputs = written(tmp_path / "cache", predict, source, augment=dict)
  batch = {"id": source.ids, "view": np.zeros(ROWS, np.int32)}
  expected = logits(source.arrays["image"] + 1)
  np.testing.assert_array_equal(outputs.add_columns(batch)["teacher/logits.values"], expected)
  teacher = teachers.host(predict, identity="test")
  run = jax.jit(lambda image: teacher.apply({}, {}, {"image": image}, train=False, key=None)[0])
  for added in (0, 1):  # The second batch is what the first one became.
    image = source.arrays["image"] + added
    np.testing.assert_array_equal(run(image)["logits"], logits(image + 1))
