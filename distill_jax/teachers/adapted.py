"""Makes teachers of one other Model, or of the batch: another dtype, fewer classes, an EMA."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from distill_jax.errors import check_integer, suggest
from distill_jax.models.adapters.kinds import check_model
from distill_jax.models.precision import cast, check_floating
from distill_jax.types import CACHED, Model, Outputs, Variables

_COLUMNS = (".values", ".indices")  # Every codec of `cache.codecs` has one of them.


def with_dtype(model: Model, *, dtype: DTypeLike) -> Model:
  """Returns the model with weights and inputs in another dtype: a bfloat16 teacher of a float32
  student.

  Its outputs depend on the program that contains it: XLA keeps some intermediate results in
  float32, and which ones
  depends on the batch size and on what is compiled with it. In bfloat16 a logit then differs by a
  unit in the last place (2^-8 of its size; 0.016 for logits up to 2.4, measured on digits), so that
  a run from its cache and one with the live teacher end farther apart than in float32: parameters
  by 3.2e-4 instead of 0.

  Args:
    model: any Model; floating weights, states and batch entries are cast, integers stay.
    dtype: a floating dtype. Losses still compute in float32.

  Raises:
    ValueError: the dtype is not floating, or the model is an EMA, which has the student's dtype.

  >>> from distill_jax import models, teachers
  >>> teacher = models.from_apply(None, lambda w, x: x @ w, variables=jnp.eye(2))
  >>> teachers.with_dtype(teacher, dtype=jnp.bfloat16).variables.params.dtype
  dtype(bfloat16)
  """
  check_floating(dtype)
  check_model("model", model)
  if model.ema_update is not None:
    raise ValueError(
      "model: expected one with weights, got an EMA of the student: pass it without with_dtype"
    )

  def init(key, batch) -> Variables:
    return Variables(*cast(tuple(model.init(key, batch)), dtype))

  def apply(params, state, batch, *, train, key):
    return model.apply(params, state, cast(dict(batch), dtype), train=train, key=key)

  variables = model.variables and Variables(*cast(tuple(model.variables), dtype))
  return Model(init, apply, variables)


def cached() -> Model:
  """Returns a teacher without weights: its outputs are the batch's 'teacher/logits',
  'teacher/block3', ...

  Raises (in apply):
    ValueError: the batch has none, or the columns of a `cache.Cache`, whose `model` decodes them.

  >>> from distill_jax import teachers
  >>> teacher = teachers.cached()
  >>> batch = {"image": jnp.ones((2, 3)), "teacher/logits": jnp.zeros((2, 5))}
  >>> sorted(teacher.apply(*teacher.variables, batch, train=False, key=None)[0])
  ['logits']
  """

  def apply(params, state, batch, *, train, key):
    del params, train, key
    outputs = {name.removeprefix(CACHED): x for name, x in batch.items() if name.startswith(CACHED)}
    if not outputs:
      raise ValueError(f"batch: expected teacher outputs '{CACHED}...', got {sorted(batch)}")
    for name in outputs:
      if name.endswith(_COLUMNS):
        raise ValueError(
          f"batch: expected decoded outputs, got the cache's column '{CACHED}{name}': "
          "use `Cache.model` as the teacher"
        )
    return outputs, state

  return Model(lambda key, batch: Variables({}, {}), apply, Variables({}, {}))


def moving_average(student: Model, *, decay: float = 0.999) -> Model:
  """Returns a teacher whose weights are an exponential moving average of the student's.

  After each update `average = d average + (1 - d) student`, with `d = min(decay, (1 + step) / (10 +
  step))` so that the random initial weights are forgotten soon. Batch statistics are averaged in
  the same way. The average is part of the train state, in float32 or wider, and hence of its
  checkpoints.
  Source: Tarvainen & Valpola 2017.

  Args:
    student: the Model that is trained.
    decay: weight of the average in each update, in [0, 1).

  Raises:
    ValueError: decay outside [0, 1).

  >>> from distill_jax import models, teachers
  >>> student = models.from_apply(lambda key, x: jnp.zeros((3, 2)), lambda w, x: x @ w)
  >>> teachers.moving_average(student, decay=0.99).ema_update is not None
  True
  """
  check_model("student", student)
  if not 0 <= decay < 1:
    raise ValueError(f"decay: expected a number in [0, 1), got {decay}")

  def ema_update(average: Variables, current: Variables, step: jax.Array) -> Variables:
    t = step.astype(jnp.float32)
    d = jnp.minimum(decay, (1 + t) / (10 + t))

    def blend(a, b):
      floating = jnp.issubdtype(a.dtype, jnp.floating)
      return (a + (1 - d).astype(a.dtype) * (b - a)) if floating else b

    return jax.tree.map(blend, average, current)

  return Model(student.init, student.apply, None, ema_update, sample=student.sample)


def select_classes(
  model: Model, classes: Sequence[int], *, output: str | tuple[str, ...] = "class_logits"
) -> Model:
  """Returns a teacher with the student's classes, from one that knows others, too.

      select_classes(coco_teacher, (2, 5, 7))  # car, bus and truck, the student's 0, 1 and 2
      select_classes(ssd_teacher, (2, 5, 7, 80))  # a background class is one of them

  A softmax over the selected logits is the teacher's distribution given that one of them is right;
  sigmoids stay as they are. Around a live teacher it selects in every step; around `Cache.model`
  the cache holds all classes. A cache that is written from the result holds these columns only, and
  is another one than that of other classes: their numbers are part of the teacher's variables.

  Args:
    model: the teacher.
    classes: the teacher's number of each of the student's classes, in the student's order.
    output: name, or names, of its outputs with classes along the last axis.

  Raises:
    ValueError: at once, no classes, one that is no number >= 0 or is selected twice, or an EMA,
      which has the student's classes; in apply, an output that is missing or has fewer classes.

  >>> from distill_jax import models, teachers
  >>> teacher = models.from_apply(None, lambda w, x: {"class_logits": x @ w}, variables=jnp.eye(3))
  >>> selected = teachers.select_classes(teacher, (2, 0))
  >>> batch = {"image": jnp.array([[1.0, 2.0, 3.0]])}
  >>> selected.apply(*selected.variables, batch, train=False, key=None)[0]["class_logits"]
  Array([[3., 1.]], dtype=float32)
  """
  check_model("model", model)
  if model.ema_update is not None:
    raise ValueError(
      "model: expected one with weights, got an EMA, which has the student's classes"
    )
  is_list = isinstance(classes, Sequence | np.ndarray) and not isinstance(classes, str)
  if not is_list or not len(classes) or len(set(classes)) < len(classes):
    raise ValueError(
      f"classes: expected the teacher's number of each of the student's classes, got {classes!r}: "
      "write (2, 5, 7), without repetitions"
    )
  numbers = np.array([check_integer("classes", number, 0) for number in classes], np.int32)
  names = (output,) if isinstance(output, str) else tuple(output)

  def with_numbers(variables: Variables) -> Variables:
    return Variables(variables.params, {"model": variables.state, "classes": numbers})

  def init(key, batch) -> Variables:
    return with_numbers(model.init(key, batch))

  def apply(params, state, batch, *, train, key):
    if not isinstance(state, Mapping) or "classes" not in state:
      raise ValueError(
        "state: expected the variables of select_classes(...), got those of another model: pass "
        "the result's own variables"
      )
    outputs, inner = model.apply(params, state["model"], batch, train=train, key=key)
    selected = {name: _select(outputs, name, numbers) for name in names}
    return {**outputs, **selected}, {**state, "model": inner}

  return Model(init, apply, model.variables and with_numbers(model.variables))


def _select(outputs: Outputs, name: str, numbers: np.ndarray) -> jax.Array:
  """Returns the columns of an output.

  Raises:
    ValueError: the output is missing, or has too few columns.
  """
  if name not in outputs:
    raise ValueError(f"output: expected one of the teacher, got {name!r}{suggest(name, outputs)}")
  shape = getattr(outputs[name], "shape", ())
  if not shape or shape[-1] <= numbers.max():
    got = f"{shape[-1]} classes" if shape else type(outputs[name]).__name__
    raise ValueError(
      f"classes: expected numbers below the teacher's number of classes, got {numbers.max()} for "
      f"{name!r} with {got}: leave out classes that the teacher lacks, in the student, too"
    )
  return outputs[name][..., numbers]
