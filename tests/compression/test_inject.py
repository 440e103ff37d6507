import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.compression.initialization.provenance import format_origins, joined
from distill_jax.compression.initialization.teacher import (
  Origin,
  inject,
  inject_factors,
  projected,
  sliced,
)
from distill_jax.models import from_nnx
from distill_jax.models.zoo.cnn import CNN
from distill_jax.trees import matching


def layers(rng, count, width, prefix="layers"):
  return {
    prefix: [{"kernel": rng.normal(size=(width, width)).astype(np.float32)} for _ in range(count)]
  }


def test_every_other_layer(rng):
  student, teacher = layers(rng, 3, 4) | {"own": jnp.ones(2)}, layers(rng, 6, 4)
  params, origins = inject(
    student, teacher, {rf"^layers/{i}/": f"layers/{2 * i}/" for i in range(3)}
  )
  for i in range(3):
    np.testing.assert_array_equal(params["layers"][i]["kernel"], teacher["layers"][2 * i]["kernel"])
  np.testing.assert_array_equal(params["own"], 1)
  assert origins == {
    "layers/0/kernel": Origin((4, 4), "layers/0/kernel", (4, 4), "copied"),
    "layers/1/kernel": Origin((4, 4), "layers/2/kernel", (4, 4), "copied"),
    "layers/2/kernel": Origin((4, 4), "layers/4/kernel", (4, 4), "copied"),
    "own": Origin((2,)),
  }


def test_patterns_rename_and_the_first_one_counts(rng):
  student, teacher = layers(rng, 2, 4, "block"), layers(rng, 2, 4)
  params, origins = inject(student, teacher, {"^block/0": "layers/1", r"^block/(\d)": r"layers/\1"})
  assert [origin.source for origin in origins.values()] == ["layers/1/kernel", "layers/1/kernel"]
  np.testing.assert_array_equal(params["block"][0]["kernel"], teacher["layers"][1]["kernel"])


def test_slices_are_the_papers():
  """Indices as the authors' code gives them: a step where it divides, else a rounded line."""
  array = np.arange(8)[:, None] * 100 + np.arange(7)
  np.testing.assert_array_equal(
    sliced(array, (4, 3)), np.array([0, 2, 4, 6])[:, None] * 100 + [0, 3, 6]
  )
  np.testing.assert_array_equal(sliced(array, (8, 7)), array)
  np.testing.assert_array_equal(sliced(np.arange(10.0), (4,)), [0, 3, 6, 9])


def test_a_wider_network_whose_other_channels_are_dead_is_sliced_without_loss(rng):
  """Every second channel of the teacher is zero, so the student with the other ones says the same."""
  teacher, student = (
    from_nnx(lambda rngs, w=w: CNN(1, w, 10, rngs=rngs)) for w in ((8, 12), (4, 6))
  )
  wide, narrow = (jax.jit(m.init)(jax.random.key(i), {}) for i, m in enumerate((teacher, student)))
  params = wide.params
  for block in (
    params["blocks"].values() if isinstance(params["blocks"], dict) else params["blocks"]
  ):
    block["conv"]["kernel"] = block["conv"]["kernel"].at[..., 1::2].set(0)
  variables, origins = inject(narrow, wide, fit=sliced)
  batch = {"image": jnp.asarray(rng.normal(size=(2, 8, 8, 1)), jnp.float32)}
  large, small = (
    jax.jit(lambda v, m=m: m.apply(*v, batch, train=False, key=None)[0]["logits"])(v)
    for m, v in ((teacher, wide), (student, variables))
  )
  np.testing.assert_allclose(small, large, atol=1e-5)
  assert origins["params/blocks/1/conv/kernel"] == Origin(
    (3, 3, 4, 6), "params/blocks/1/conv/kernel", (3, 3, 8, 12), "sliced"
  )
  assert origins["state/blocks/0/norm/mean"].source_shape == (8,)


def test_factors_are_the_best_of_their_rank(rng):
  kernel = rng.normal(size=(6, 5)).astype(np.float32)
  student = {"a": jnp.zeros((6, 3), jnp.bfloat16), "b": jnp.zeros((3, 5)), "c": jnp.ones(1)}
  params, origins = inject_factors(student, {"w": kernel}, {("a", "b"): "w"})
  assert (
    params["a"].dtype == jnp.bfloat16
    and origins["b"].how == "factorized"
    and origins["c"].source is None
  )
  params, _ = inject_factors(student | {"a": jnp.zeros((6, 3))}, {"w": kernel}, {("a", "b"): "w"})
  left = np.asarray(params["a"] @ params["b"], np.float64) - kernel
  values = np.linalg.svd(kernel.astype(np.float64))[1]
  np.testing.assert_allclose(np.linalg.norm(left), np.sqrt((values[3:] ** 2).sum()), rtol=1e-5)
  for factor in (params["a"], params["b"].T):
    np.testing.assert_allclose(factor.T @ factor, np.diag(values[:3]), atol=1e-4)


def test_injected_layers_can_be_frozen(rng):
  params = jax.tree.map(jnp.asarray, layers(rng, 2, 4))
  step = optax.chain(optax.adamw(1e-2), optax.freeze(lambda tree: matching(tree, "^layers/0/")))
  updates, _ = step.update(params, step.init(params), params)
  np.testing.assert_array_equal(updates["layers"][0]["kernel"], 0)
  assert (updates["layers"][1]["kernel"] != 0).all()


def test_errors_show_every_leaf_that_fits_nowhere(rng):
  student, teacher = layers(rng, 2, 4), layers(rng, 2, 8)
  with pytest.raises(
    ValueError, match=r"'\^encoder' fits no leaf of the student; some are layers/0/kernel"
  ):
    inject(student, teacher, {"^encoder": "layers"})
  for pattern, replacement in (("(", ""), ("layers", r"\1")):
    with pytest.raises(ValueError, match="is no substitution"):
      inject(student, teacher, {pattern: replacement})
  with pytest.raises(ValueError) as caught:
    inject(student, teacher, {"layers/0": "layers/9", "layers/1": "layers/1"})
  assert "layers/0/kernel: the teacher has no 'layers/9/kernel'; did you mean" in str(caught.value)
  assert "layers/1/kernel [4, 4] from layers/1/kernel: expected the teacher's shape [8, 8]" in str(
    caught.value
  )
  for bad in (layers(rng, 2, 9), {"layers": [{"kernel": np.ones(4)}] * 2}):
    with pytest.raises(ValueError, match="cannot be sliced"):
      inject(bad, teacher, fit=sliced)
  with pytest.raises(ValueError, match="no factors of w"):
    inject_factors(
      {"a": np.ones((4, 3)), "b": np.ones((2, 4))}, {"w": np.ones((4, 4))}, {("a", "b"): "w"}
    )
  with pytest.raises(ValueError, match="the student has no 'x'"):
    inject_factors({"a": np.ones((4, 3))}, {"w": np.ones((4, 4))}, {("a", "x"): "w"})


def test_a_sharded_teacher_gives_the_same_weights(rng, mesh):
  student, teacher = {"w": jnp.zeros((4, 8))}, {"w": rng.normal(size=(8, 16)).astype(np.float32)}
  placed = jax.device_put(teacher, NamedSharding(mesh, PartitionSpec("data")))
  factors = {"a": jnp.zeros((8, 2)), "b": jnp.zeros((2, 16))}
  for one, many in (
    (inject(student, teacher, fit=sliced), inject(student, placed, fit=sliced)),
    (
      inject_factors(factors, teacher, {("a", "b"): "w"}),
      inject_factors(factors, placed, {("a", "b"): "w"}),
    ),
  ):
    jax.tree.map(np.testing.assert_array_equal, one[0], many[0])
    assert one[1] == many[1]


def test_a_projected_embedding_keeps_inner_products_best(rng):
  table, head = (rng.normal(size=shape).astype(np.float32) for shape in ((20, 8), (8, 20)))
  student = {"embed": jnp.zeros((20, 3)), "head": jnp.zeros((3, 20)), "own": jnp.ones(1)}
  teacher = {"embed": table, "head": head, "own": np.zeros(1)}
  params, origins = inject(
    student, teacher, {"^embed$": "embed", "^head$": "head"}, fit=projected(table, 3)
  )
  left = (
    np.asarray(params["embed"] @ params["embed"].T, np.float64) - table.astype(np.float64) @ table.T
  )
  values = np.linalg.eigvalsh(table.astype(np.float64) @ table.T)[::-1]
  np.testing.assert_allclose(np.linalg.norm(left), np.sqrt((values[3:8] ** 2).sum()), rtol=1e-5)
  assert origins["head"] == Origin((3, 20), "head", (8, 20), "projected") and origins[
    "own"
  ] == Origin((1,))
  # A teacher of rank 3 loses nothing: its states in the directions of the embedding are read as before.
  low = (table[:, :3] @ table[:3]).astype(np.float32)
  params, _ = inject(
    student, teacher | {"embed": low}, {"^embed$": "embed", "^head$": "head"}, fit=projected(low, 3)
  )
  np.testing.assert_allclose(params["embed"] @ params["head"], low @ head, atol=1e-4)


def test_what_cannot_be_projected_is_refused(rng):
  table = rng.normal(size=(20, 8))
  for embedding, width in ((table, 9), (table, 0), (table[0], 2), (table[:4], 5)):
    with pytest.raises(ValueError, match=f"with at least width={width} of each"):
      projected(embedding, width)
  with pytest.raises(
    ValueError, match="cannot be projected from the teacher's .* as 8 there and 3 here"
  ):
    inject({"w": jnp.zeros((20, 4))}, {"w": table}, fit=projected(table, 3))


def test_the_report_says_where_each_array_came_from(rng):
  student, teacher = layers(rng, 2, 2) | {"own": jnp.ones(2)}, layers(rng, 2, 4)
  params, first = inject(student, teacher, {"^layers/0": "layers/1"}, fit=sliced)
  _, second = inject(params, layers(rng, 2, 2), {"^layers/1": "layers/1"})
  assert format_origins(joined(first, second)).splitlines() == [
    "2 of 3 arrays and 8 of 10 numbers (80.0 %) come from the teacher",
    "  layers/0/kernel [2, 2]  sliced from layers/1/kernel [4, 4]",
    "  layers/1/kernel [2, 2]  copied from layers/1/kernel [2, 2]",
    "  own [2]                 its own",
  ]
  assert format_origins({}) == "0 of 0 arrays and 0 of 0 numbers (0.0 %) come from the teacher"
