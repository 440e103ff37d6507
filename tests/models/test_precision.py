"""Tests weights in another dtype: what is cast, and that no layer casts it back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.models import cast, from_nnx
from distill_jax.models.zoo.bit import BiT
from distill_jax.models.zoo.resnet import ResNet

NETWORKS = {
  "bit": lambda rngs, dtype=jnp.bfloat16: BiT(
    1, (1, 1, 1, 1), 3, width=0.5, dtype=dtype, rngs=rngs
  ),
  "resnet": lambda rngs, dtype=jnp.bfloat16: ResNet(
    1, 8, 3, widths=(8, 8, 8, 8), dtype=dtype, rngs=rngs
  ),
}
BATCH = {"image": np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)}


def test_only_floats_are_cast():
  tree = {
    "w": jnp.full(3, 1 / 3),
    "n": jnp.arange(3),
    "on": jnp.ones(2, bool),
    "key": jax.random.key(1),
  }
  abstract = jax.eval_shape(lambda: tree)
  narrow = cast(tree, jnp.bfloat16)
  assert narrow["w"].dtype == jnp.bfloat16 and abs(float(narrow["w"][0]) - 1 / 3) < 2**-9
  assert all(narrow[name] is tree[name] for name in ("n", "on", "key"))
  assert jax.eval_shape(lambda: narrow) == cast(abstract, jnp.bfloat16)


@pytest.mark.parametrize("dtype", [jnp.int8, bool])
def test_dtype_that_is_not_floating_raises(dtype):
  with pytest.raises(ValueError, match="^dtype: "):
    cast({"w": jnp.ones(2)}, dtype)


def applied(model, variables):
  return model.apply(*variables, BATCH, train=False, key=None)[0]["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_narrow_weights_cost_no_more_than_narrow_arithmetic(name, rng):
  model, exact = (
    from_nnx(lambda rngs, d=d: NETWORKS[name](rngs, dtype=d)) for d in (jnp.bfloat16, None)
  )
  variables = model.init(jax.random.key(0), BATCH)
  variables = jax.tree.map(lambda x: x + jnp.float32(0.3 * rng.normal(size=x.shape)), variables)
  truth, wide, narrow = (
    np.float64(jax.jit(lambda v, m=m: applied(m, v))(v))
    for m, v in ((exact, variables), (model, variables), (model, cast(variables, jnp.bfloat16)))
  )
  assert (
    0 < np.abs(narrow - truth).max() < 3 * np.abs(wide - truth).max() < 0.3 * np.abs(truth).max()
  )


def cast_kernels(model):
  """Returns how many kernels a forward pass casts to another dtype."""
  variables = cast(jax.eval_shape(model.init, jax.random.key(0), BATCH), jnp.bfloat16)
  kernels = {x.shape for x in jax.tree.leaves(variables.params) if x.ndim > 1}
  equations = jax.make_jaxpr(lambda v: applied(model, v))(variables).jaxpr.eqns
  return sum(
    e.primitive.name == "convert_element_type" and e.invars[0].aval.shape in kernels
    for e in equations
  )


def test_no_kernel_is_cast_back():
  # BiT standardizes its kernels in float32; ResNet computes with them as they are.
  assert cast_kernels(from_nnx(NETWORKS["resnet"])) == 0
  assert cast_kernels(from_nnx(lambda rngs: NETWORKS["resnet"](rngs, dtype=None))) == 10
