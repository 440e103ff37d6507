import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compression_networks import output_fn, random_variables
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.compression.initialization.provenance import combine_origins, format_origins
from distill_jax.compression.initialization.teacher import (
  Origin,
  init_from_factors,
  init_from_teacher,
  projected,
  sliced,
)
from distill_jax.models import from_nnx
from distill_jax.models.zoo.cnn import CNN
from distill_jax.trees import path_mask


def layers(rng, count, width, prefix="layers"):
  return {
    prefix: [{"kernel": rng.normal(size=(width, width)).astype(np.float32)} for _ in range(count)]
  }


def test_every_other_layer(rng):
  student, teacher = layers(rng, 3, 4) | {"own": jnp.ones(2)}, layers(rng, 6, 4)
  params, origins = init_from_teacher(
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


def test_first_matching_pattern_renames(rng):
  student, teacher = layers(rng, 2, 4, "block"), layers(rng, 2, 4)
  params, origins = init_from_teacher(
    student, teacher, {"^block/0": "layers/1", r"^block/(\d)": r"layers/\1"}
  )
  assert [origin.source for origin in origins.values()] == ["layers/1/kernel", "layers/1/kernel"]
  np.testing.assert_array_equal(params["block"][0]["kernel"], teacher["layers"][1]["kernel"])


def detector_params(rng, width):
  """Parameters of a detector: a backbone of this width, a neck and a head of width 4."""

  def layer(*shape):
    return {
      "kernel": rng.normal(size=shape).astype(np.float32),
      "bias": np.ones(shape[-1], np.float32),
    }

  return {
    "levels": [layer(width, width) for _ in range(2)],
    "lateral": [layer(width, 4) for _ in range(2)],
    "smooth": [layer(3, 3, 4, 4) for _ in range(2)],
    "towers": {name: [layer(3, 3, 4, 4)] for name in ("class_logits", "box_bins")},
    "predictors": {"class_logits": layer(4, 3), "box_bins": layer(4, 8)},
  }


def test_neck_and_head_of_a_detector_start_from_the_teachers(rng):
  student, teacher = detector_params(rng, 2), detector_params(rng, 6)
  head = {"^(smooth|towers|predictors)/": r"\1/"}
  params, origins = init_from_teacher(student, teacher, head)
  for part, source in [
    ("levels", student),
    ("lateral", student),
    ("smooth", teacher),
    ("towers", teacher),
    ("predictors", teacher),
  ]:
    jax.tree.map(np.testing.assert_array_equal, params[part], source[part])
  copied_names = {name for name, origin in origins.items() if origin.how == "copied"}
  assert len(copied_names) == 12 and "predictors/box_bins/kernel" in copied_names
  # The neck reads a backbone of a third of the channels.
  params, _ = init_from_teacher(student, teacher, head | {"^lateral/": "lateral/"}, fit=sliced)
  for i in range(2):
    every_third = teacher["lateral"][i]["kernel"][::3]
    np.testing.assert_array_equal(params["lateral"][i]["kernel"], every_third)


def test_slices_match_the_authors_code():
  """Indices are multiples of a step where it divides, else rounded."""
  array = np.arange(8)[:, None] * 100 + np.arange(7)
  np.testing.assert_array_equal(
    sliced(array, (4, 3)), np.array([0, 2, 4, 6])[:, None] * 100 + [0, 3, 6]
  )
  np.testing.assert_array_equal(sliced(array, (8, 7)), array)
  np.testing.assert_array_equal(sliced(np.arange(10.0), (4,)), [0, 3, 6, 9])


def test_slicing_away_dead_channels_keeps_the_outputs(rng):
  """Every second channel of the teacher is zero, so a student of the others has its outputs."""
  teacher, student = (
    from_nnx(lambda rngs, w=w: CNN(1, w, 10, rngs=rngs)) for w in ((8, 12), (4, 6))
  )
  wide, narrow = (random_variables(m, rng) for m in (teacher, student))
  params = wide.params
  blocks = params["blocks"].values() if isinstance(params["blocks"], dict) else params["blocks"]
  for block in blocks:
    for layer, name in (("conv", "kernel"), ("norm", "bias"), ("norm", "scale")):
      block[layer][name] *= np.arange(block[layer][name].shape[-1]) % 2 == 0
  variables, origins = init_from_teacher(narrow, wide, fit=sliced)
  batch = {"image": rng.normal(size=(2, 8, 8, 1)).astype(np.float32)}
  large = output_fn(teacher, "logits", batch)(wide)
  small = output_fn(student, "logits", batch)(variables)
  np.testing.assert_allclose(small, large, atol=1e-5)
  assert origins["params/blocks/1/conv/kernel"] == Origin(
    (3, 3, 4, 6), "params/blocks/1/conv/kernel", (3, 3, 8, 12), "sliced"
  )
  assert origins["state/blocks/0/norm/mean"].source_shape == (8,)


def test_factors_are_the_best_of_their_rank(rng):
  kernel = rng.normal(size=(6, 5)).astype(np.float32)
  student = {"a": jnp.zeros((6, 3), jnp.bfloat16), "b": jnp.zeros((3, 5)), "c": jnp.ones(1)}
  params, origins = init_from_factors(student, {"w": kernel}, {("a", "b"): "w"})
  assert (
    params["a"].dtype == jnp.bfloat16
    and origins["b"].how == "factorized"
    and origins["c"].source is None
  )
  params, _ = init_from_factors(
    student | {"a": jnp.zeros((6, 3))}, {"w": kernel}, {("a", "b"): "w"}
  )
  left = np.asarray(params["a"] @ params["b"], np.float64) - kernel
  values = np.linalg.svd(kernel.astype(np.float64))[1]
  np.testing.assert_allclose(np.linalg.norm(left), np.sqrt((values[3:] ** 2).sum()), rtol=1e-5)
  for factor in (params["a"], params["b"].T):
    np.testing.assert_allclose(factor.T @ factor, np.diag(values[:3]), atol=1e-4)


def test_initialized_layers_can_be_frozen(rng):
  params = jax.tree.map(jnp.asarray, layers(rng, 2, 4))
  step = optax.chain(optax.adamw(1e-2), optax.freeze(lambda tree: path_mask(tree, "^layers/0/")))
  updates, _ = step.update(params, step.init(params), params)
  np.testing.assert_array_equal(updates["layers"][0]["kernel"], 0)
  assert (updates["layers"][1]["kernel"] != 0).all()


def test_leaves_that_do_not_fit_raise(rng):
  student, teacher = layers(rng, 2, 4), layers(rng, 2, 8)
  with pytest.raises(ValueError, match=r"^layers: .*layers/0/kernel.*'\^encoder'"):
    init_from_teacher(student, teacher, {"^encoder": "layers"})
  for pattern, replacement in (("(", ""), ("layers", r"\1")):
    with pytest.raises(ValueError, match="^layers:"):
      init_from_teacher(student, teacher, {pattern: replacement})
  lines = (
    r"layers/0/kernel: .*'layers/9/kernel'.*\n  layers/1/kernel from layers/1/kernel: .*\[8, 8\]"
  )
  with pytest.raises(ValueError, match=lines):
    init_from_teacher(student, teacher, {"layers/0": "layers/9", "layers/1": "layers/1"})
  for bad in (layers(rng, 2, 9), {"layers": [{"kernel": np.ones(4)}] * 2}):
    with pytest.raises(ValueError, match=r"layers/0/kernel from .*\[8, 8\]"):
      init_from_teacher(bad, teacher, fit=sliced)
  with pytest.raises(ValueError, match=r"^the .*\n  a, b: .*factors of w"):
    init_from_factors(
      {"a": np.ones((4, 3)), "b": np.ones((2, 4))}, {"w": np.ones((4, 4))}, {("a", "b"): "w"}
    )
  with pytest.raises(ValueError, match=r"\n  x:"):
    init_from_factors({"a": np.ones((4, 3))}, {"w": np.ones((4, 4))}, {("a", "x"): "w"})


def test_sharded_teacher_gives_the_same_weights(rng, mesh):
  student, teacher = {"w": jnp.zeros((4, 8))}, {"w": rng.normal(size=(8, 16)).astype(np.float32)}
  placed = jax.device_put(teacher, NamedSharding(mesh, PartitionSpec("data")))
  factors = {"a": jnp.zeros((8, 2)), "b": jnp.zeros((2, 16))}
  for one, many in (
    (
      init_from_teacher(student, teacher, fit=sliced),
      init_from_teacher(student, placed, fit=sliced),
    ),
    (
      init_from_factors(factors, teacher, {("a", "b"): "w"}),
      init_from_factors(factors, placed, {("a", "b"): "w"}),
    ),
  ):
    jax.tree.map(np.testing.assert_array_equal, one[0], many[0])
    assert one[1] == many[1]


def test_projected_embedding_keeps_inner_products_best(rng):
  table, head = (rng.normal(size=shape).astype(np.float32) for shape in ((20, 8), (8, 20)))
  student = {"embed": jnp.zeros((20, 3)), "head": jnp.zeros((3, 20)), "own": jnp.ones(1)}
  teacher = {"embed": table, "head": head, "own": np.zeros(1)}
  params, origins = init_from_teacher(
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
  # A teacher of rank 3 loses nothing: the head reads its states in the embedding's directions.
  low = (table[:, :3] @ table[:3]).astype(np.float32)
  params, _ = init_from_teacher(
    student, teacher | {"embed": low}, {"^embed$": "embed", "^head$": "head"}, fit=projected(low, 3)
  )
  np.testing.assert_allclose(params["embed"] @ params["head"], low @ head, atol=1e-4)


def test_arrays_that_cannot_be_projected_raise(rng):
  table = rng.normal(size=(20, 8))
  for embedding, width in ((table, 9), (table, 0), (table[0], 2), (table[:4], 5)):
    with pytest.raises(ValueError, match=f"^embedding: .*width={width} "):
      projected(embedding, width)
  with pytest.raises(ValueError, match=r"w from w: .*8 projected to 3, got \[20, 4\]"):
    init_from_teacher({"w": jnp.zeros((20, 4))}, {"w": table}, fit=projected(table, 3))


def test_format_origins_lists_the_source_of_each_array(rng):
  student, teacher = layers(rng, 2, 2) | {"own": jnp.ones(2)}, layers(rng, 2, 4)
  params, first = init_from_teacher(student, teacher, {"^layers/0": "layers/1"}, fit=sliced)
  _, second = init_from_teacher(params, layers(rng, 2, 2), {"^layers/1": "layers/1"})
  assert format_origins(combine_origins(first, second)).splitlines() == [
    "2 of 3 arrays and 8 of 10 values (80.0 %) come from the teacher",
    "  layers/0/kernel [2, 2]  sliced from layers/1/kernel [4, 4]",
    "  layers/1/kernel [2, 2]  copied from layers/1/kernel [2, 2]",
    "  own [2]                 not from the teacher",
  ]
  assert format_origins({}) == "0 of 0 arrays and 0 of 0 values (0.0 %) come from the teacher"
