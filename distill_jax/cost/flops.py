"""Counts FLOPs in a traced program: in a compiled one, XLA counts a loop once."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval


def product_flops(jaxpr: ClosedJaxpr) -> float:
  """Returns the FLOPs of the matrix products and convolutions that the results depend on.

  They are those of all devices. The body of a scan counts as often as it runs, that of a `while`
  once, and of a `cond` the branch with most FLOPs. A product and its sum count two; taps of a
  convolution on the border count too.
  """
  live, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
  return _flops(live)


def _flops(jaxpr) -> float:
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contract, _), _ = params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    terms = math.prod(left[axis] for axis in contract)
    return 2 * math.prod(equation.outvars[0].aval.shape) * terms
  if name == "conv_general_dilated":
    kernel = equation.invars[1].aval.shape
    layout = params["dimension_numbers"].rhs_spec
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[layout[0]]
  inner = [_flops(jaxpr) for jaxpr in _inner_jaxprs(list(params.values()))]
  if name == "cond":
    return max(inner)
  return sum(inner) * (params["length"] if name == "scan" else 1)


def _inner_jaxprs(values: Any) -> Iterator[Any]:
  """Yields the programs among an equation's parameters."""
  for value in jax.tree.leaves(values, is_leaf=lambda x: hasattr(x, "jaxpr")):
    value = getattr(value, "jaxpr", value)
    if hasattr(value, "eqns"):
      yield value
