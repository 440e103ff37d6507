"""A distillation with group norm whose costs have formulas."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from distill_jax import losses, objectives
from distill_jax.models import from_nnx

ROWS = 16


class Net(nnx.Module):
  """A convolution, group norm, a second convolution, the mean, a head."""

  def __init__(self, width, *, norm=nnx.GroupNorm, dtype=None, rngs):
    layers = {"dtype": dtype, "rngs": rngs}
    groups = {"num_groups": 4} if norm is nnx.GroupNorm else {}
    self.conv1 = nnx.Conv(3, width, (3, 3), **layers)
    self.norm = norm(width, **groups, **layers)
    self.conv2 = nnx.Conv(width, width, (3, 3), **layers)
    self.head = nnx.Linear(width, 10, **layers)

  def __call__(self, x):
    x = self.conv2(nnx.relu(self.norm(self.conv1(x))))
    return {"map": x, "logits": self.head(nnx.relu(x).mean((1, 2)))}


def parameters(width):
  """Returns the number of parameters of a `Net`: two convolutions, the norm and the head."""
  return 9 * 3 * width + width + 2 * width + 9 * width * width + width + 10 * width + 10


def network(width, **options):
  return from_nnx(lambda rngs: Net(width, **options, rngs=rngs))


def batch(rows=ROWS, side=32):
  number = jax.ShapeDtypeStruct((rows,), jnp.int32)
  image = jax.ShapeDtypeStruct((rows, side, side, 3), jnp.float32)
  return {"id": number, "view": number, "label": number, "image": image}


def job(**options):
  """Returns arguments of `compile_for` after the topology, with widths of 8 and 16."""
  objective = objectives.weighted(
    soft=(1.0, objectives.logits(losses.kl_divergence, temperature=1.0))
  )
  return network(8, **options), network(16, **options), objective, optax.adam(1e-3), batch()
