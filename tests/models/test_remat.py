"""Tests blocks that are computed again in the backward pass: the same values, and less that is
stored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill_jax.models import from_nnx
from distill_jax.models.remat import POLICIES, rematerialized
from distill_jax.models.zoo.bit import BiT
from distill_jax.models.zoo.resnet import ResNet, WideResNet

ROWS = 5


class Dropped(nnx.Module):
  """Two blocks of a user's own, with dropout."""

  def __init__(self, remat="", *, rngs):
    self.layers = nnx.data([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.head = nnx.Linear(6, 3, rngs=rngs)
    self.remat = remat

  def block(self, layer, x):
    return self.dropout(jnp.tanh(layer(x)))

  def __call__(self, x):
    x = x.reshape(len(x), -1)[:, :6]
    for layer in self.layers:
      x = rematerialized(Dropped.block, self.remat)(self, layer, x)
    return self.head(x)


NETWORKS = {
  "resnet": functools.partial(ResNet, 1, 8, 3, widths=(2, 2, 3, 4)),
  "wide": functools.partial(WideResNet, 1, 10, 1, 3),
  "bit": functools.partial(BiT, 1, (2, 1, 1, 1), 3, width=0.5),
  "dropout": Dropped,
}
BLOCKS = {"resnet": 3, "wide": 3, "bit": 5, "dropout": 2}
# What does not depend on the size of the images: 1x1 and 3x3 convolutions in every unit.
CONVOLUTIONS = {"resnet": 1 + 6 + 2, "wide": 1 + 6 + 2, "bit": 1 + 5 * 3 + 4}


def parameters_and_loss(name, remat):
  """Returns parameters, and a function from them to a loss with the outputs and the new state."""
  model = from_nnx(lambda rngs: NETWORKS[name](remat=remat, rngs=rngs))
  rng = np.random.default_rng(0)
  batch = {"image": jnp.asarray(rng.normal(size=(ROWS, 8, 8, 1)), jnp.float32)}
  shapes = jax.eval_shape(model.init, jax.random.key(0), batch)

  def value(path, leaf):
    values = 0.3 * rng.normal(size=leaf.shape)
    return jnp.asarray(values + ("scale" in jax.tree_util.keystr(path)), leaf.dtype)

  params = jax.tree_util.tree_map_with_path(value, shapes.params)
  state = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes.state)

  def loss(params):
    outputs, new_state = model.apply(params, state, batch, train=True, key=jax.random.key(1))
    inner = outputs.get("stage1_preact", 0.0)
    return jnp.square(outputs["logits"]).sum() + jnp.mean(inner), (outputs, new_state)

  return params, loss


@functools.cache
def results(name, remat):
  params, loss = parameters_and_loss(name, remat)
  return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.parametrize(
  "name, policy",
  [
    ("resnet", "nothing_saveable"),
    *(("dropout", policy) for policy in POLICIES),
    *(
      pytest.param(name, "nothing_saveable", marks=pytest.mark.nightly) for name in ("wide", "bit")
    ),
  ],
)
def test_gradients_outputs_and_states_are_the_same(name, policy):
  plain, again = results(name, ""), results(name, policy)
  assert jax.tree.structure(plain) == jax.tree.structure(again)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), plain, again)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_block_is_rematerialized(name):
  def blocks(remat):
    params, loss = parameters_and_loss(name, remat)
    equations = jax.make_jaxpr(loss)(params).jaxpr.eqns
    return [e.params["policy"] for e in equations if "policy" in e.params]

  assert blocks("") == []
  assert blocks("dots_saveable") == [jax.checkpoint_policies.dots_saveable] * BLOCKS[name]


def stored(name, remat):
  """Returns the elements of each example that the backward pass reads in maps [B, H, W, C]."""
  params, loss = parameters_and_loss(name, remat)
  residuals = jax.eval_shape(lambda p: jax.tree.leaves(jax.vjp(loss, p, has_aux=True)[1]), params)
  return sum(x.size for x in residuals if x.ndim == 4 and x.shape[0] == ROWS) // ROWS


def convolutions(name, remat):
  params, loss = parameters_and_loss(name, remat)
  text = str(jax.make_jaxpr(jax.grad(lambda p: loss(p)[0]))(params))
  return text.count(" = conv_general_dilated[")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_less_is_stored_and_dots_saveable_repeats_no_convolution(name):
  none, dots, nothing = (stored(name, p) for p in ("", "dots_saveable", "nothing_saveable"))
  assert nothing < 0.9 * dots and dots < 0.7 * none
  # Forward, and backward with respect to kernels and, but for the stem, to inputs.
  assert convolutions(name, "") == 3 * CONVOLUTIONS[name] - 1
  assert convolutions(name, "dots_saveable") == convolutions(name, "")
  assert convolutions(name, "nothing_saveable") > convolutions(name, "")


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_unknown_policy_raises(name):
  with pytest.raises(ValueError, match="^remat: .*'dot_saveable'; did you mean 'dots_saveable'"):
    nnx.eval_shape(lambda: NETWORKS[name](remat="dot_saveable", rngs=nnx.Rngs(0)))
