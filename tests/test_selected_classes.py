"""A teacher with the student's classes: live, in a cache and around one; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import cache, losses, objectives, teachers
from distill_jax.models import from_apply

LOCATIONS, CLASSES = 4, 5


def detector():
  """A teacher with 5 classes and a background; its weights differ a little from class to class."""
  weights = 0.01 * np.random.default_rng(3).normal(size=(6, LOCATIONS, CLASSES + 1)) - 4.6

  def apply(w, x):
    logits = jnp.einsum("bi,iac->bac", x, w)
    return {"class_logits": logits, "type": 2 * logits, "p3": x}

  return from_apply(None, apply, inputs="x", variables=weights.astype(np.float32))


@pytest.fixture
def arrays(rng):
  return {"id": np.arange(5), "x": rng.random((5, 6)).astype(np.float32)}


def outputs_of(model, batch):
  return jax.jit(lambda batch: model.apply(*model.variables, batch, train=False, key=None)[0])(
    batch
  )


def test_columns_follow_the_students_classes(arrays):
  teacher = detector()
  full = outputs_of(teacher, arrays)
  classes = [3, 0, CLASSES]
  selected = outputs_of(teachers.select_classes(teacher, classes), arrays)
  np.testing.assert_array_equal(selected["class_logits"], full["class_logits"][..., classes])
  for name in ("type", "p3"):
    np.testing.assert_array_equal(selected[name], full[name])
  without_weights = teacher._replace(init=lambda key, batch: teacher.variables, variables=None)
  model = teachers.select_classes(without_weights, classes)
  assert model.variables is None and model.init(jax.random.key(0), arrays).state["model"] == {}
  both = teachers.select_classes(teacher, (1,), output=("class_logits", "type"))
  assert [outputs_of(both, arrays)[name].shape[-1] for name in ("class_logits", "type")] == [1, 1]


def test_cache_holds_the_columns_of_its_mapping_only(arrays, tmp_path):
  teacher = detector()
  specs = {"class_logits": cache.Dense("float32")}
  selected = teachers.select_classes(teacher, (3, 0, 1))
  stored = cache.write_cache(str(tmp_path / "part"), selected, arrays, specs, progress=False)
  cache.check_teacher(stored, selected, selected.variables, specs, arrays)
  for classes in ((0, 3, 1), (3, 0, 2), (3, 0)):
    other = teachers.select_classes(teacher, classes)
    with pytest.raises(cache.Mismatch, match=r"teacher\.weights"):
      cache.check_teacher(stored, other, other.variables, specs, arrays)


def test_one_cache_of_all_classes_serves_any_mapping(arrays, tmp_path):
  teacher = detector()
  specs = {"class_logits": cache.Dense("float32")}
  stored = cache.write_cache(str(tmp_path / "all"), teacher, arrays, specs, progress=False)
  batch = stored.add_columns(arrays | {"view": np.zeros(5, np.int32)})
  outputs = outputs_of(teachers.select_classes(stored.model, (2, 1)), batch)
  expected = outputs_of(teacher, arrays)["class_logits"][..., [2, 1]]
  np.testing.assert_array_equal(outputs["class_logits"], expected)


def test_a_student_of_fewer_classes_is_distilled(arrays):
  teacher = teachers.select_classes(detector(), (4, 2))
  student = {"class_logits": np.zeros((5, LOCATIONS, 2), np.float32)}
  term = objectives.locations(losses.binary_kl, output="class_logits")
  outputs = outputs_of(teacher, arrays)
  term.init(jax.random.key(0), student, outputs)
  with pytest.raises(ValueError, match="^class_logits: .*select_classes"):
    term.init(jax.random.key(0), student, outputs_of(detector(), arrays))


@pytest.mark.parametrize("classes", [(), (1, 1), (-1,), (0.5,), "01", {0: 1}, (True,), 3, None])
def test_what_is_no_mapping_raises_at_once(classes):
  with pytest.raises(ValueError, match="^classes: expected"):
    teachers.select_classes(detector(), classes)


def test_classes_and_outputs_that_the_teacher_lacks_raise(arrays):
  with pytest.raises(
    ValueError, match="^classes: expected .*got 6 .*'class_logits' with 6 classes"
  ):
    outputs_of(teachers.select_classes(detector(), (0, 6)), arrays)
  with pytest.raises(ValueError, match="^output: expected .*'class_logits'"):
    outputs_of(teachers.select_classes(detector(), (0,), output="clas_logits"), arrays)
  average = teachers.moving_average(detector())
  with pytest.raises(ValueError, match="^model: "):
    teachers.select_classes(average, (0,))
  stored = from_apply(
    None, lambda w, x: {"class_logits": losses.top_k(x, 2)}, inputs="x", variables=jnp.ones(1)
  )
  with pytest.raises(ValueError, match="^classes: .*SparseTargets"):
    teachers.select_classes(stored, (0,)).apply(
      {}, {"model": {}, "classes": 0}, arrays, train=False, key=None
    )
  with pytest.raises(ValueError, match="^state: expected"):
    teachers.select_classes(detector(), (0,)).apply(
      *detector().variables, arrays, train=False, key=None
    )
