"""This package's losses of the cases in peer_cases.py."""

import jax

from distill_jax import losses


def value(case, args):
  """Returns the mean over the batch, and the state of losses that have one."""
  name, kwargs = case.name, case.kwargs
  if name == "standardize":
    out = losses.kl_divergence(*map(losses.standardize, args), **kwargs)
  elif name in (
    "sparse_kl",
    "sparse_kl_conditional",
    "sparse_kl_smoothed",
    "sparse_jensen_shannon",
    "sampled_cross_entropy",
  ):
    out = getattr(losses, name)(args[0], losses.SparseTargets(*args[1:]), **kwargs)
  else:
    out = getattr(losses, name)(*args[:-1], _learned(name, args[-1]), **kwargs)
  values, state = (out, ()) if isinstance(out, jax.Array) else out
  return values.mean(), state


def _learned(name, last):
  """Returns the last argument in the loss's type, from plain tuples."""
  if name == "layer_attention":
    return losses.LayerAttention(*last)
  if name == "crd":
    return losses.CrdState(*last)
  return tuple(losses.Context(*block) for block in last) if name == "fgd" else last
