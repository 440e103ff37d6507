import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compression_networks import output_fn
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.compression.initialization.merge import merge
from distill_jax.compression.pruning.groups import Group, groups_of
from distill_jax.models import from_nnx
from distill_jax.models.llm.decoder import Decoder
from distill_jax.models.zoo.resnet import ResNet
from distill_jax.trees import named_leaves
from distill_jax.types import Variables

MODELS = {
  "resnet": lambda *widths: from_nnx(lambda rngs: ResNet(1, 8, 10, widths=widths, rngs=rngs)),
  "decoder": lambda heads, inner: from_nnx(
    lambda rngs: Decoder(32, 16, 2, heads, head_dim=4, mlp_dim=inner, rngs=rngs), inputs="tokens"
  ),
}
SIZES = {
  "resnet": ((4, 4, 6, 8), (6, 6, 7, 12)),
  "decoder": ((2, 10), (4, 13)),
}


def positive_variables(model, rng):
  shapes = jax.eval_shape(model.init, jax.random.key(0), {})
  return jax.tree.map(
    lambda w: jnp.asarray(np.abs(rng.normal(size=w.shape)) + 0.1, w.dtype), shapes
  )


def widened(narrow, shapes, groups, rng):
  """Net2WiderNet, section 2.3: unit i copies g(i), readers are divided by the copies of g(i)."""
  params, state = ({n: np.asarray(w) for n, w in named_leaves(tree)} for tree in narrow)
  wide = dict(named_leaves(shapes.params))
  for group in groups.values():
    path, axis = group.writers[0]
    old, new = params[path].shape[axis], wide[path].shape[axis]
    part = new // group.parts if group.parts else 1
    old, new = old // part, new // part
    g = rng.permutation(np.concatenate([np.arange(old), rng.integers(0, old, new - old)]))
    counts = np.bincount(g)[g]
    where = (g[:, None] * part + np.arange(part)).ravel()
    for tree, slots in ((params, group.writers), (state, group.state)):
      for path, axis in slots:
        tree[path] = tree[path].take(where, axis)
    for path, axis in group.readers:
      shape = [1] * params[path].ndim
      shape[axis] = -1
      params[path] = params[path].take(where, axis) / np.repeat(counts, part).reshape(shape)
  leaves = [
    jnp.asarray(tree[n], w.dtype)
    for tree, s in zip((params, state), shapes)
    for n, w in named_leaves(s)
  ]
  return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


@pytest.mark.parametrize("name", MODELS)
def test_merging_a_widened_teacher_undoes_it(rng, name):
  small, large = (MODELS[name](*sizes) for sizes in SIZES[name])
  narrow, shapes = positive_variables(small, rng), jax.eval_shape(large.init, jax.random.key(0), {})
  groups = groups_of(shapes.params, head_dim=4)
  teacher = widened(narrow, shapes, groups, rng)
  student, origins = merge(jax.eval_shape(small.init, jax.random.key(0), {}), teacher, groups)
  batch = {
    "image": rng.normal(size=(2, 8, 8, 1)).astype(np.float32),
    "tokens": np.arange(12).reshape(2, 6),
  }
  output = "hidden" if name == "decoder" else "logits"
  run = output_fn(small, output, batch)
  wide = output_fn(large, output, batch)(teacher)
  np.testing.assert_allclose(wide, run(narrow), rtol=2e-4, atol=1e-5)
  np.testing.assert_allclose(run(student), wide, rtol=2e-4, atol=1e-5)
  assert {origin.how for origin in origins.values()} == {"merged", "copied"}


def test_units_become_their_mean_and_readers_their_sum():
  teacher = {
    "a": jnp.asarray([[0.0, 5.0, 0.2, 9.0]]),
    "b": jnp.asarray([[1.0], [2.0], [3.0], [4.0]]),
  }
  student = {"a": jnp.zeros((1, 3)), "b": jnp.zeros((3, 1))}
  groups = {"g": Group((("a", 1),), (("b", 0),), (("mean", 0),))}
  merged, origins = merge(
    Variables(student, {"mean": jnp.zeros(3)}),
    Variables(teacher, {"mean": jnp.asarray([0.0, 1, 2, 3])}),
    groups,
  )
  # The mean counts for the distance as well, and 0 and 2 are still the nearest.
  np.testing.assert_allclose(merged.params["a"], [[0.1, 5.0, 9.0]], rtol=1e-6)
  np.testing.assert_allclose(merged.params["b"], [[4.0], [2.0], [4.0]])
  np.testing.assert_allclose(merged.state["mean"], [1.0, 1.0, 3.0])
  assert origins["params/b"].source_shape == (4, 1) and origins["params/b"].how == "merged"


def test_sharded_teacher_gives_the_same_weights(rng, mesh):
  teacher = {
    "a": rng.normal(size=(8, 16)).astype(np.float32),
    "b": rng.normal(size=(16, 8)).astype(np.float32),
  }
  student = Variables({"a": jnp.zeros((8, 5)), "b": jnp.zeros((5, 8))}, {})
  groups = {"g": Group((("a", 1),), (("b", 0),))}
  placed = jax.device_put(teacher, NamedSharding(mesh, PartitionSpec("data")))
  one, many = (merge(student, Variables(tree, {}), groups)[0] for tree in (teacher, placed))
  jax.tree.map(np.testing.assert_array_equal, one, many)


def test_variables_that_do_not_fit_raise():
  groups = {"g": Group((("a", 1),), (("b", 0),))}
  teacher = Variables({"a": jnp.ones((2, 4)), "b": jnp.ones((4, 3))}, {})
  with pytest.raises(ValueError, match="^group 'g': expected 1 to 4 units of 1 .*got 5 .* of a"):
    merge(Variables({"a": jnp.ones((2, 5)), "b": jnp.ones((5, 3))}, {}), teacher, groups)
  with pytest.raises(ValueError, match="^group 'g': expected 'a' .*'aa'"):
    merge(Variables({"aa": jnp.ones((2, 5))}, {}), teacher, groups)
  lines = r"params/b: expected \[2, 2\] .*got \[2, 3\]\n  params/c: expected \[1\] .*got none"
  with pytest.raises(ValueError, match=lines):
    merge(
      Variables({"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2)), "c": jnp.ones(1)}, {}),
      teacher,
      groups,
    )
  for state in ({}, {"mean": jnp.ones(3)}):
    with_state = groups["g"]._replace(state=(("mean", 0),))
    with pytest.raises(ValueError, match="^group 'g': expected 'mean' with 4 units"):
      merge(
        Variables({"a": jnp.ones((2, 2)), "b": jnp.ones((2, 3))}, {}),
        teacher._replace(state=state),
        {"g": with_state},
      )
  heads = {"g": Group((("a", 1),), (("b", 0),), parts=2)}
  with pytest.raises(ValueError, match="^group 'g': .*units of 2 .*got 3 .* axis 1 of a"):
    merge(Variables({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}, {}), teacher, heads)
