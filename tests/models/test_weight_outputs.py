"""Tests weights as outputs, and the term that compares them with a teacher's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from distill_jax import objectives, reduce
from distill_jax.models import from_apply, from_nnx, with_weights
from distill_jax.models.zoo.vit import ViT
from distill_jax.objectives import layer_map, weighted, weights
from distill_jax.train import StepOptions, make_init, make_train_step

KERNELS = r"(query|key|value)/kernel$"
BLOCKS = {rf"^blocks/{s - 1}/": f"blocks/{t - 1}/" for s, t in layer_map(2, 4)}


def vit(depth, width=8):
  return from_nnx(lambda rngs: ViT(1, 8, 3, width, depth, 2, rngs=rngs))


def batch(rng):
  images = rng.normal(size=(16, 8, 8, 1)).astype(np.float32)
  return {"image": images, "label": rng.integers(0, 3, 16).astype(np.int32)}


def chain(depth):
  """Returns a model of blocks of one kernel each."""

  def init(key, image):
    keys = jax.random.split(key, depth)
    return {
      "blocks": {str(i): {"kernel": jax.random.normal(keys[i], (4, 4))} for i in range(depth)}
    }

  def apply(params, image):
    x = image.reshape(len(image), -1)[:, :4]
    for i in range(depth):
      x = x @ params["blocks"][str(i)]["kernel"]
    return x

  return from_apply(init, apply)


def test_selected_parameters_are_outputs_and_all_else_stays(rng):
  bare, b = chain(2), batch(rng)
  model = with_weights(bare, "1/kernel$")
  assert model.init is bare.init and model.variables is bare.variables
  variables = model.init(jax.random.key(0), b)
  outputs, _ = model.apply(*variables, b, train=True, key=None)
  assert set(outputs) == {"logits", "weights"} and set(outputs["weights"]) == {"blocks/1/kernel"}
  kernel = variables.params["blocks"]["1"]["kernel"]
  np.testing.assert_array_equal(outputs["weights"]["blocks/1/kernel"], kernel)
  expected, _ = bare.apply(*variables, b, train=True, key=None)
  np.testing.assert_array_equal(outputs["logits"], expected["logits"])
  with pytest.raises(ValueError, match="kernle"):
    with_weights(bare, "kernle").apply(*variables, b, train=True, key=None)


def test_pattern_selects_kernels_of_every_block(rng):
  model, b = with_weights(vit(2), KERNELS), batch(rng)
  run = lambda: model.apply(*model.init(jax.random.key(0), b), b, train=True, key=None)  # noqa: E731
  outputs, _ = jax.eval_shape(run)
  names = {f"blocks/{k}/{name}/kernel" for k in range(2) for name in ("query", "key", "value")}
  assert set(outputs["weights"]) == names


@pytest.mark.parametrize("how", ["full", "microbatches", "mapped"])
def test_step_moves_weights_to_the_teachers(rng, mesh, how):
  # The gradient is 2 (W_s - W_t) / size, divided by the number of matrices.
  student, teacher = (with_weights(chain(depth), "kernel$") for depth in (2, 4))
  parts = student, teacher, weighted(same=(0.5, weights(layers=BLOCKS))), optax.sgd(10.0)
  b = batch(rng)
  options = {"microbatches": {"microbatches": 2}, "mapped": {"axis_name": "data"}}
  state, teacher_outputs = (
    make_init(*parts)(jax.random.key(0), b),
    teacher.init(jax.random.key(1), b),
  )
  step = make_train_step(*parts, StepOptions(**options.get(how, {})))
  if how == "mapped":
    whole, rows = PartitionSpec(), PartitionSpec("data")
    step = jax.shard_map(step, mesh=mesh, in_specs=(whole, whole, rows), out_specs=whole)
  new, measured = jax.jit(step)(state, teacher_outputs, b)
  values = []
  for s, t in (("0", "1"), ("1", "3")):
    weight, other = (
      np.float64(v["blocks"][i]["kernel"])
      for v, i in ((state.params["student"], s), (teacher_outputs.params, t))
    )
    values.append(((weight - other) ** 2).mean())
    moved = weight - 10 * 0.5 * 2 * (weight - other) / 16 / 2
    np.testing.assert_allclose(
      new.params["student"]["blocks"][s]["kernel"], moved, rtol=1e-4, atol=1e-5
    )
  np.testing.assert_allclose(reduce.value(measured["same"]), np.mean(values), rtol=1e-5)


@pytest.mark.integration
def test_all_terms_of_a_transformers_stages_decrease(rng):
  student, teacher = with_weights(vit(1), KERNELS), with_weights(vit(2), KERNELS)
  pairs, maps = layer_map(1, 2), (("map1",), ("map1", "map2"))
  goal = weighted(
    hard=(0.1, objectives.labels()),
    looks=(1.0, objectives.attention(pairs)),
    related=(1.0, objectives.relations(pairs, relation_heads=2, names=("values",))),
    stages=(1.0, objectives.layer_attention(*maps, width=4)),
    same=(1.0, weights(layers={"^blocks/0": "blocks/1"})),
  )
  parts, b = (student, teacher, goal, optax.adam(3e-3)), batch(rng)
  state, teacher_outputs = (
    jax.jit(make_init(*parts))(jax.random.key(0), b),
    jax.jit(teacher.init)(jax.random.key(1), b),
  )
  step, seen = jax.jit(make_train_step(*parts)), []
  for _ in range(12):
    state, measured = step(state, teacher_outputs, b)
    seen.append(
      {name: float(reduce.value(measured[name])) for name in ("looks", "related", "stages", "same")}
    )
  assert all(seen[-1][name] < seen[0][name] for name in seen[0]), (seen[0], seen[-1])


def shaped(**arrays):
  return {
    "weights": {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in arrays.items()}
  }


@pytest.mark.parametrize(
  "student, teacher, layers, field",
  [
    ({}, {"key": (2, 2)}, None, "^weights: "),
    ({"key": (2, 2)}, {"keys": (2, 2)}, None, "'key'.*did you mean 'keys'"),
    ({"a/key": (2, 2)}, {"b/key": (2, 2)}, {"^a": "c"}, "^c/key: "),
    ({"key": (2, 2)}, {"key": (3, 2)}, None, r"'key'.*\(3, 2\)"),
  ],
)
def test_weights_without_a_counterpart_raise_in_init(student, teacher, layers, field):
  outputs = shaped(**student) if student else {"logits": jnp.zeros(2)}
  with pytest.raises(ValueError, match=field):
    weights(layers=layers).init(jax.random.key(0), outputs, shaped(**teacher))
