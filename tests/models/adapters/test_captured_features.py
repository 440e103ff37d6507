"""Tests outputs of submodules that adapters capture by path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_networks import KEY, LIBRARIES, LinenTwice, Twice, assert_same, ones

from distill_jax.models import from_linen, from_nnx

NORMS = {"nnx": "block/norm", "linen": "block/LayerNorm_0"}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("library", LIBRARIES)
def test_features_have_their_names_and_gradients(library, train, rng):
  batch = {"image": rng.normal(size=(6, 3, 4)).astype(np.float32)}
  model = LIBRARIES[library]({"norm": NORMS[library], "out": "block"})
  variables = jax.jit(model.init)(KEY, batch)

  @jax.jit
  def run(params):
    def value(params):
      outputs, _ = model.apply(params, variables.state, batch, train=train, key=KEY)
      return (outputs["norm"] ** 2 * jnp.arange(4)).sum(), outputs

    return jax.grad(value, has_aux=True)(params)

  gradient, outputs = run(variables.params)
  assert outputs.keys() == {"logits", "norm", "out"}
  head = variables.params["head"]
  assert_same(outputs["logits"], outputs["out"].mean(1) @ head["kernel"] + head["bias"], 1e-5)
  np.testing.assert_allclose(outputs["norm"].mean(-1), 0, atol=1e-5)
  attention = {"nnx": "attention", "linen": "MultiHeadDotProductAttention_0"}[library]
  leaves = jax.tree.leaves(gradient["block"][attention])
  assert any((leaf != 0).any() for leaf in leaves)


@pytest.mark.parametrize(
  "make", [lambda **k: from_nnx(Twice, **k), lambda **k: from_linen(LinenTwice(), **k)]
)
def test_calls_of_one_submodule_are_numbered(make):
  model = make(features={"first": "layer:0", "second": "layer:1", "all": ""})
  batch = ones(2, 4)
  variables = model.init(KEY, batch)
  outputs, _ = model.apply(*variables, batch, train=False, key=None)
  layer = variables.params["layer"]
  assert_same(outputs["first"], batch["image"] @ layer["kernel"] + layer["bias"])
  assert_same(outputs["second"], outputs["logits"], 0)
  assert_same(outputs["all"], outputs["logits"], 0)
  with pytest.raises(ValueError, match="features: .*'layer'.*'layer:"):
    make(features=["layer"]).apply(*variables, batch, train=False, key=None)


@pytest.mark.parametrize("library", LIBRARIES)
def test_features_never_replace_outputs(library):
  def run(features):
    model = LIBRARIES[library](features)
    batch = ones(6, 3, 4)
    apply = lambda: model.apply(*model.init(KEY, batch), batch, train=False, key=None)  # noqa: E731
    return jax.eval_shape(apply)

  with pytest.raises(ValueError, match="^features: .*'logits'"):
    run({"logits": "block/norm"})
  with pytest.raises(ValueError, match="^features: .*{'block': 'block'}"):
    run("block")


@pytest.mark.parametrize("library", LIBRARIES)
def test_unknown_path_names_the_nearest(library):
  model = LIBRARIES[library]({"x": "block/norm_"})

  def run():
    return model.apply(*model.init(KEY, ones(6, 3, 4)), ones(6, 3, 4), train=False, key=None)

  with pytest.raises(ValueError, match=rf"features: .*'x'.*'block/norm_'.*'{NORMS[library]}'"):
    jax.eval_shape(run)
