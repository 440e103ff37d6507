"""Computes blocks of a network again in the backward pass, to store less for it
(`jax.checkpoint`)."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from distill_jax.errors import suggest

POLICIES = ("nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")


def rematerialized(block: Callable[..., Any], policy: str) -> Callable[..., Any]:
  """Returns a block that stores what the policy allows, and computes the rest again in the backward
  pass.

      for block in self.blocks:
        x = rematerialized(Block.__call__, self.remat)(block, x)

  Compiled for v5e, WRN-16-4 in bfloat16 with 1,024 images of 32 x 32 takes 949 MiB of temporaries
  with 'nothing_saveable' instead of 1,181, and 2.53e12 FLOPs instead of 2.23e12. On a CPU it costs
  the time and
  saves nothing: there XLA stores what it would have stored (jax 0.10.2).

  Args:
    block: function `(nnx module, *arrays) -> arrays`, such as the method of a class.
    policy: name of a policy of `jax.checkpoint_policies`. 'nothing_saveable' stores the arguments
      only, at the cost of a second forward pass of the block; 'dots_saveable' also stores the
      results of convolutions and matrix products, so that only norms and activations are computed
      again. Empty: the block as it is.

  Raises:
    ValueError: an unknown policy.

  >>> from flax import nnx
  >>> from distill_jax import models
  >>> block = models.rematerialized(nnx.Linear.__call__, "nothing_saveable")
  >>> graph, state = nnx.split(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
  >>> forward = lambda state, x: block(nnx.merge(graph, state), x)
  >>> "nothing_saveable" in str(jax.make_jaxpr(forward)(state, jnp.ones((2, 4))))
  True
  """
  if not policy:
    return block
  check_policy(policy)
  return nnx.remat(block, policy=getattr(jax.checkpoint_policies, policy))


def check_policy(policy: str) -> None:
  """Checks that a policy is empty or one of `POLICIES`.

  Raises:
    ValueError: it is neither; the message has the nearest name.
  """
  if policy and policy not in POLICIES:
    raise ValueError(f"remat: expected a policy, got {policy!r}{suggest(policy, POLICIES)}")
