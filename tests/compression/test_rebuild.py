"""A network that is pruned, shrunk, exported and rebuilt has the same outputs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compression_networks import output_fn, random_variables

from distill_jax.compression.pruning.channels import prune_channels, taylor
from distill_jax.compression.pruning.groups import Group, groups_of, under, widths
from distill_jax.compression.pruning.layers import drop_layers, layers_of, prune_layers
from distill_jax.compression.pruning.masks import PolynomialSchedule
from distill_jax.compression.pruning.rebuild import arguments_of
from distill_jax.compression.pruning.shrink import living_channels, shrink
from distill_jax.models import from_nnx
from distill_jax.models.llm.decoder import Decoder
from distill_jax.models.zoo.cnn import CNN
from distill_jax.models.zoo.mlp import MLP
from distill_jax.models.zoo.vgg import VGG
from distill_jax.models.zoo.vit import ViT
from distill_jax.storage.stablehlo import export_stablehlo, load_stablehlo
from distill_jax.storage.student import export_student, load_student
from distill_jax.types import Variables

ONCE = PolynomialSchedule(0, 0)
WIDTHS = {
  "mlp": [16, 12],
  "cnn": [8, 12, 16],
  "vgg": [8, 16, 32, 32, 64, 64, 64, 64],
}
DECODER = {
  "num_kv_heads": 4,
  "head_dim": 6,
  "mlp_dim": 20,
  "qkv_bias": True,
  "qk_norm": True,
}
DENSE = {
  "mlp": lambda rngs: MLP(64, (16, 12), 10, rngs=rngs),
  "cnn": lambda rngs: CNN(1, (8, 12, 16), 10, rngs=rngs),
  "vgg": lambda rngs: VGG(1, 11, 10, width=0.125, rngs=rngs),
  "decoder": lambda rngs: Decoder(32, 16, 2, 8, **DECODER, rngs=rngs),
  "vit": lambda rngs: ViT(1, 8, 10, 24, 2, 4, distilled=True, rngs=rngs),
}
CLASSES = {
  "mlp": MLP,
  "cnn": CNN,
  "vgg": VGG,
  "decoder": Decoder,
  "vit": functools.partial(ViT, channels=1, size=8),
}
HEAD_DIMS = {"decoder": 6, "vit": 6}


def model_of(name, make):
  return from_nnx(make, inputs="tokens" if name == "decoder" else "image")


def network(name, rng):
  model = model_of(name, DENSE[name])
  return model, random_variables(model, rng)


def batch_of(name, rng):
  if name == "decoder":
    return {"tokens": rng.integers(0, 32, (3, 7)).astype(np.int32)}
  return {"image": rng.normal(size=(3, 8, 8, 1)).astype(np.float32)}


def groups_for(name, params):
  """Returns all channels, neurons and heads."""
  return groups_of(params, head_dim=HEAD_DIMS.get(name))


def apply_masks(step, params, gradients=None):
  @jax.jit
  def run(params, gradients):
    updates, _ = step.update(gradients, step.init(params), params)
    return optax.apply_updates(params, updates)

  return run(params, params if gradients is None else gradients)


@pytest.mark.parametrize("name", DENSE)
def test_shrunk_network_is_exported_and_rebuilt(rng, tmp_path, name):
  model, variables = network(name, rng)
  params, groups = variables.params, groups_for(name, variables.params)
  step = prune_channels(optax.sgd(0.0), groups, ONCE, sparsity=0.5)
  if name in HEAD_DIMS:
    step = prune_layers(step, layers_of, ONCE, sparsity=0.5)
  masked = Variables(apply_masks(step, params), variables.state)
  fewer = drop_layers(masked, layers_of(masked.params)) if name in HEAD_DIMS else masked
  small = shrink(fewer, groups_for(name, fewer.params))
  sizes = widths(groups_for(name, fewer.params), fewer.params)
  small_sizes = widths(groups_for(name, small.params), small.params)
  assert small_sizes == {group: round(size * 0.5) for group, size in sizes.items()}
  assert name not in WIDTHS or list(sizes.values()) == WIDTHS[name]

  arguments = arguments_of(small.params, head_dim=HEAD_DIMS.get(name))
  folder = export_student(small, tmp_path, description={"arguments": arguments})
  read = json.loads((folder / "model.json").read_text())["description"]["arguments"]
  again = model_of(name, lambda rngs: CLASSES[name](**read, rngs=rngs))
  batch = batch_of(name, rng)
  loaded = load_student(folder, again, batch)
  output = "hidden" if name == "decoder" else "logits"
  run = output_fn(model, output, batch)
  large = run(masked)
  assert np.abs(large - run(variables)).max() > 0.1
  new = output_fn(again, output, batch)(loaded)
  np.testing.assert_allclose(new, large, rtol=1e-5, atol=1e-5)
  if name == "cnn":
    export_stablehlo(again, loaded, batch, folder, outputs=[output], platforms=["cpu"])
    np.testing.assert_allclose(load_stablehlo(folder)(batch)[output], large, rtol=1e-5, atol=1e-5)


def test_heads_are_groups_with_their_queries(rng):
  _, variables = network("decoder", rng)
  groups = groups_of(variables.params, head_dim=6)
  assert widths(groups, variables.params) == {
    f"blocks/{b}/{part}": width
    for b in range(2)
    for part, width in (("attention", 4), ("inner", 20))
  }
  masked = apply_masks(prune_channels(optax.sgd(0.0), groups, ONCE, sparsity=0.5), variables.params)
  block, dead = masked["blocks"][1], ~living_channels(masked, groups)["blocks/1/attention"]
  # The two of the four heads with the smallest root mean square: 6 values of keys and of values,
  # 2 * 6 of queries.
  kernels = [
    np.asarray(variables.params["blocks"][1][n]["kernel"], np.float64)
    for n in ("query", "key", "value")
  ]
  parts = [
    np.concatenate([np.split(w, 4, axis=1)[head].ravel() for w in kernels]) for head in range(4)
  ]
  assert set(np.flatnonzero(dead)) == set(np.argsort([(part**2).mean() for part in parts])[:2])
  for name, size in (("query", 12), ("key", 6), ("value", 6)):
    for part in ("kernel", "bias"):
      zero = (np.asarray(block[name][part]).reshape(-1, 4 * size) == 0).all(0)
      np.testing.assert_array_equal(zero, np.repeat(dead, size))


def test_blocks_are_pruned_by_their_effect_on_the_loss(rng, mesh):
  tree = {"student": {"blocks": {}}}
  for block in range(4):
    tree["student"]["blocks"][block] = {
      n: {"kernel": rng.normal(size=(4, 8)).astype(np.float32)} for n in ("output", "down", "up")
    }
  gradients = jax.tree.map(lambda w: rng.normal(size=w.shape).astype(np.float32), tree)

  def student_layers(params):
    return under("student", layers_of(params["student"]))

  schedule = PolynomialSchedule(0, 2)
  step = prune_layers(optax.adam(1e-2), student_layers, schedule, sparsity=0.75, score=taylor)

  @jax.jit
  def update(params, state):
    updates, state = step.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  def run(params):
    state, history = jax.jit(step.init)(params), []
    for _ in range(4):
      params, state = update(params, state)
      history.append(
        [bool(mask.any()) for mask in living_channels(params, student_layers(params)).values()]
      )
    return params, state, history

  one, state, history = run(tree)
  assert [sum(row) for row in history] == [4, 1, 1, 1]
  sums = []
  stepped, _ = update(tree, jax.jit(step.init)(tree))
  for block, block_gradients in zip(
    stepped["student"]["blocks"].values(), gradients["student"]["blocks"].values(), strict=True
  ):
    pairs = [(block[n]["kernel"], block_gradients[n]["kernel"]) for n in ("output", "down")]
    sums.append(abs(sum((np.float64(w) * np.float64(g)).sum() for w, g in pairs)))
  assert history[1].index(True) == int(np.argmax(sums))
  sharded = jax.device_put(tree, jax.NamedSharding(mesh, jax.P(None, "data")))
  many, many_state, many_history = run(sharded)
  assert history == many_history
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    (one, state.masks),
    (many, many_state.masks),
  )


def test_remaining_blocks_are_numbered_again():
  params = {"stem": jnp.ones(2), "blocks": [{"w": jnp.full(2, float(i))} for i in range(4)]}
  layers = {f"blocks/{i}": Group(((f"blocks/{i}/w", 0),), (), parts=1) for i in range(4)}
  params["blocks"][2]["w"] *= 0
  state = {"blocks": {i: jnp.asarray(i) for i in range(4)}}
  small = drop_layers(Variables(params, state), layers)
  assert [float(block["w"][0]) for block in small.params["blocks"]] == [1.0, 3.0]
  assert small.state == {"blocks": {0: 1, 1: 3}}
  for block in params["blocks"]:
    block["w"] *= 0
  assert len(drop_layers(Variables(params, {}), layers).params["blocks"]) == 1
  with pytest.raises(ValueError, match="^layers: .*got 'b0'"):
    drop_layers(Variables(params, {}), {"b0": layers["blocks/0"]})


@pytest.mark.parametrize("widths", [(1, 2, 3, 6, 6), (21, 43, 85, 171, 171)])
def test_width_of_a_vgg_from_its_arrays(widths):
  width = widths[-1] / 512
  model = from_nnx(lambda rngs: VGG(1, 13, 10, width=width, rngs=rngs))
  params = jax.eval_shape(model.init, jax.random.key(0), {}).params
  arguments = arguments_of(params)
  assert (arguments["depth"], arguments["channels"], arguments["classes"]) == (13, 1, 10)
  again = from_nnx(lambda rngs: VGG(**arguments, rngs=rngs))
  assert jax.eval_shape(again.init, jax.random.key(0), {}).params == params


def test_invalid_arguments_raise(rng):
  _, variables = network("vit", rng)
  params = variables.params
  for width in (None, 0, 7):
    with pytest.raises(ValueError, match=f"^head_dim: .* got {width}"):
      groups_of(params, head_dim=width)
  kernel = params["blocks"][1]["up"]["kernel"]
  params["blocks"][1]["up"]["kernel"] = kernel[:, :-1]
  with pytest.raises(ValueError, match=r"^params: .*\[96, 95\] outputs of up"):
    arguments_of(params, head_dim=6)
  _, other = network("vgg", rng)
  other.params["blocks"][0][0]["conv"]["kernel"] = jnp.ones((3, 3, 1, 5))
  with pytest.raises(ValueError, match=r"^params: .*got \[\[5\], \[16\]"):
    arguments_of(other.params)
  with pytest.raises(ValueError, match="^group 'g': .*{'a, axis 0': 5}"):
    widths({"g": Group((("a", 0),), (), parts=2)}, {"a": jnp.ones(5)})
  with pytest.raises(ValueError, match="^sparsity:"):
    prune_layers(optax.sgd(0.0), layers_of, ONCE, sparsity=1)
  with pytest.raises(ValueError, match="^layers:"):
    prune_layers(optax.sgd(0.0), groups_of, ONCE, sparsity=0.5).init(network("mlp", rng)[1].params)
  with pytest.raises(ValueError, match="^params:"):
    layers_of(other.params)
