"""Networks that compute their blocks again in the backward pass: the same numbers, and less that is kept."""

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


class Dropped(nnx.Module):
  """Two blocks of a user's own, with dropout."""

  def __init__(self, remat="", *, rngs):
    self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
    self.dropout, self.head, self.remat = (
      nnx.Dropout(0.5, rngs=rngs),
      nnx.Linear(6, 3, rngs=rngs),
      remat,
    )

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
# What does not depend on the size of the images: 1x1 and 3x3 convolutions in every unit.
CONVOLUTIONS = {"resnet": 1 + 6 + 2, "wide": 1 + 6 + 2, "bit": 1 + 5 * 3 + 4}


ROWS = 5


def trained(name, remat):
  """(parameters, a loss of them with outputs and the new state beside it)."""
  model = from_nnx(lambda rngs: NETWORKS[name](remat=remat, rngs=rngs))
  rng = np.random.default_rng(0)
  batch = {"image": jnp.asarray(rng.normal(size=(ROWS, 8, 8, 1)), jnp.float32)}
  params, state = model.init(jax.random.key(0), batch)
  params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), params)

  def loss(params):
    outputs, new = model.apply(params, state, batch, train=True, key=jax.random.key(1))
    inner = outputs.get("stage1_preact", 0.0)
    return jnp.square(outputs["logits"]).sum() + jnp.mean(inner), (outputs, new)

  return params, loss


@functools.cache
def results(name, remat):
  params, loss = trained(name, remat)
  return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.parametrize(
  "name, policy",
  [
    *((name, "nothing_saveable") for name in NETWORKS),
    *(("dropout", policy) for policy in POLICIES[1:]),
  ],
)
def test_gradients_outputs_and_states_are_the_same(name, policy):
  plain, again = results(name, ""), results(name, policy)
  assert jax.tree.structure(plain) == jax.tree.structure(again)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), plain, again)


def kept(name, remat):
  """Maps, [B, H, W, C], that the backward pass finds: their elements for each example."""
  params, loss = trained(name, remat)
  found = jax.eval_shape(lambda p: jax.tree.leaves(jax.vjp(loss, p, has_aux=True)[1]), params)
  return sum(x.size for x in found if x.ndim == 4 and x.shape[0] == ROWS) // ROWS


def convolutions(name, remat):
  params, loss = trained(name, remat)
  text = str(jax.make_jaxpr(jax.grad(lambda p: loss(p)[0]))(params))
  return text.count(" = conv_general_dilated[")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_less_is_kept_and_dots_saveable_computes_no_convolution_again(name):
  none, dots, nothing = (kept(name, policy) for policy in ("", "dots_saveable", "nothing_saveable"))
  assert nothing < 0.9 * dots and dots < 0.7 * none
  # Forward, and backward with respect to kernels and, but for the stem, to inputs.
  assert convolutions(name, "") == 3 * CONVOLUTIONS[name] - 1
  assert convolutions(name, "dots_saveable") == convolutions(name, "")
  assert convolutions(name, "nothing_saveable") > convolutions(name, "")


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_an_unknown_policy_is_refused(name):
  with pytest.raises(ValueError, match="no policy 'dot_saveable'; did you mean 'dots_saveable'"):
    nnx.eval_shape(lambda: NETWORKS[name](remat="dot_saveable", rngs=nnx.Rngs(0)))
