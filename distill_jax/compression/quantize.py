"""Students of int8: distilled with the rounding that they will have, then served with weights that are int8.

    def make(rngs):
      return ResNet(1, 8, 10, rngs=rngs)

    student = from_nnx(fake_quantized(make))                     # train it as any other
    served = from_nnx(quantized(make, fitted.variables, images))
    export_student(served.variables, folder, description={})     # a quarter of the bytes

Both compute the same: kernels in int8 with a scale for each output channel, and what they are multiplied with in int8,
with scales of its own from batch to batch. Gradients pass the rounding as if it were not there (straight through,
Bengio et al. 2013); kernels, moments and gradients are float while training. By qwix, of the extra `quantize`.

Linear layers and convolutions compute so. Norms and biases stay as they were, einsums (the products of attention) too,
and what a module does with a parameter by itself: in a `Decoder` the embedding, and the head, which the loss applies.

A module that pools by maxima does so by `models.pooling.max_pool`, as `CNN` and `VGG` do: the gradient of `x.max(axis)`
can be wrong or NaN here, because XLA on CPU computes what it compares twice, after int8 products not always with the
same rounding.
"""

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from distill_jax.types import Variables

_LAYERS = ("dot_general", "conv_general_dilated")
_CONVOLUTIONS = (nnx.Conv, nnx.ConvTranspose)
_KERNELS = (nnx.Linear, nnx.LinearGeneral, *_CONVOLUTIONS)
Maker = Callable[[nnx.Rngs], nnx.Module]


def fake_quantized(make: Maker, *, pattern: str = "", activations: bool = True) -> Maker:
  """A maker of modules that compute with int8 and are trained in float, for `from_nnx`.

  Args:
    make: `nnx.Rngs -> module`. Its parameters keep their names and shapes, so that weights of a float student fit.
    pattern: which layers, by a regular expression found in their own paths, such as 'blocks/'; "" is found in all.
    activations: what kernels are multiplied with is int8 too; without, only kernels are.

  Raises:
    ImportError: qwix is not installed.
    ValueError: when a module is made, a pattern that fits no linear layer or convolution.
  """
  qwix = _qwix()

  def fake(rngs: nnx.Rngs) -> nnx.Module:
    module = make(rngs)
    _check(module, pattern)
    provider = qwix.QtProvider(_rules(qwix, pattern, activations))
    return qwix.quantize_model(module, provider, skip_nnx_init=True)

  return fake


def quantized(
  make: Maker, variables: Variables, *inputs: Any, pattern: str = "", activations: bool = True
) -> nnx.Module:
  """A module whose kernels are int8, for `from_nnx`, from the weights of a float or `fake_quantized` student.

  Args:
    make: as for `fake_quantized`.
    variables: trained ones.
    *inputs: what the module is called with, such as images; their numbers do not matter.
    pattern, activations: as for `fake_quantized`. Convolutions need activations: qwix has none with int8 kernels alone.

  Returns:
    The module; `from_nnx` makes a Model with variables of it. An export of these is loaded by the Model of a module
    that was made of any other variables.

  Raises:
    ImportError: qwix is not installed.
    ValueError: a pattern that fits no linear layer or convolution, or convolutions without activations.
  """
  qwix = _qwix()
  module = make(nnx.Rngs(0))
  layers = _check(module, pattern)
  convolutions = [path for path, layer in layers.items() if isinstance(layer, _CONVOLUTIONS)]
  if convolutions and not activations:
    raise ValueError(
      f"activations: int8 kernels alone are for linear layers, and {convolutions[0]} is a convolution; give "
      "activations=True, or a pattern without convolutions"
    )
  nnx.update(module, variables.params)
  nnx.update(module, variables.state)
  # qwix calls the module once, which would move the statistics of batch norm in training.
  module.eval()
  return qwix.quantize_model(module, qwix.PtqProvider(_rules(qwix, pattern, activations)), *inputs)


def _qwix():
  try:
    import qwix
  except ImportError as error:
    raise ImportError("quantization needs qwix: pip install 'distill-jax[quantize]'") from error
  return qwix


def _rules(qwix, pattern: str, activations: bool) -> list:
  kinds = {"weight_qtype": jnp.int8, "act_qtype": jnp.int8 if activations else None}
  # The two providers round what an einsum multiplies differently.
  return [qwix.QuantizationRule(module_path=f".*(?:{pattern}).*", op_names=_LAYERS, **kinds)]


def _check(module: nnx.Module, pattern: str) -> dict[str, nnx.Module]:
  """The layers with a kernel in whose paths the pattern is found: a norm or a container alone has nothing to round."""
  paths = {"/".join(map(str, p)): m for p, m in nnx.iter_modules(module) if isinstance(m, _KERNELS)}
  found: dict[str, nnx.Module] = {
    path: layer for path, layer in paths.items() if re.search(pattern, path)
  }
  if not found:
    raise ValueError(
      f"pattern {pattern!r} fits no layer that can be int8, linear or a convolution; some are {', '.join([*paths][:8])}"
    )
  return found
