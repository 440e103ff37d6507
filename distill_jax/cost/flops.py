"""FLOPs as a traced program has them: the loops of a compiled one are counted once by XLA."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval


def product_flops(jaxpr: ClosedJaxpr) -> float:
  """Of the matrix products and convolutions that a program's results depend on, over all devices.

  A scan's body counts as often as it runs, a `while`'s once, of a `cond` the branch with most. Two for a product and
  its sum; taps of a convolution that fall on the border count too.
  """
  used, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, True)
  return _flops(used)


def _flops(jaxpr) -> float:
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contract, _), _ = params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return (
      2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contract)
    )
  if name == "conv_general_dilated":
    kernel, layout = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[layout[0]]
  inner = [_flops(part) for part in _parts(list(params.values()))]
  if name == "cond":
    return max(inner)
  return sum(inner) * (params["length"] if name == "scan" else 1)


def _parts(values: Any) -> Iterator[Any]:
  """The programs among an equation's parameters."""
  for value in jax.tree.leaves(values, is_leaf=lambda x: hasattr(x, "jaxpr")):
    value = getattr(value, "jaxpr", value)
    if hasattr(value, "eqns"):
      yield value
