"""A small train state that is split over all devices of all processes."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax.types import Skips, TrainState


def make_state(step, devices):
  """Returns the same values on any mesh; some leaves are split over it, others are replicated."""
  mesh = jax.make_mesh(
    (len(devices),), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
  )
  split, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))
  columns = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
  params = {"kernel": split, "wide": columns, "bias": replicated}
  zero = replicated
  shardings = TrainState(
    step=zero,
    key=zero,
    params={"student": params, "objective": {}},
    model_state={"student": {}, "objective": ()},
    opt_state=params,
    average=(),
    skips=Skips(zero, zero, zero),
  )
  return jax.jit(_state, out_shardings=shardings)(step)


def _state(step):
  def normal(index, shape, dtype=jnp.float32):
    key = jax.random.fold_in(jax.random.key(step), index)
    return jax.random.normal(key, shape).astype(dtype)

  params = {
    "kernel": normal(0, (64, 24)),
    "wide": normal(1, (16, 128), jnp.bfloat16),
    "bias": normal(2, (24,)),
  }
  zero = jnp.int32(0)
  return TrainState(
    step=jnp.int32(step),
    key=jax.random.key(7),
    params={"student": params, "objective": {}},
    model_state={"student": {}, "objective": ()},
    opt_state=jax.tree.map(jnp.square, params),
    average=(),
    skips=Skips(zero, zero, zero),
  )
