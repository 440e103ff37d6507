"""Trains students with the rounding of int8, and serves them with weights that are int8.

    def make_module(rngs):
      return ResNet(1, 8, 10, rngs=rngs)

    student = from_nnx(fake_quantize(make_module))               # train it as any other
    served = from_nnx(quantize(make_module, result.variables, images))
    export_student(served.variables, folder, description={})     # a quarter of the bytes

Both compute the same: kernels in int8 with a scale for each output channel, and their inputs in
int8, with new scales for each batch. Gradients pass the rounding as if it were the identity
(straight through, Bengio et al. 2013); kernels, moments and gradients are float while training. By
qwix, of the extra `quantize`.

Only linear layers and convolutions compute in int8. Norms, biases and einsums (the products of
attention) stay float, and so does what a module computes with a parameter by itself: in a `Decoder`
the embedding, and the head, which the loss applies.

A module that pools by maxima must use `models.pooling.max_pool`, as `CNN` and `VGG` do: the
gradient of `x.max(axis)` can be wrong or NaN here, because XLA on CPU computes the compared values
twice, and after int8 products not always with the same rounding.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax import compat
from distill_jax.errors import install_hint
from distill_jax.types import Variables

_LAYERS = ("dot_general", "conv_general_dilated")
_CONVOLUTIONS = (nnx.Conv, nnx.ConvTranspose)
_KERNELS = (nnx.Linear, nnx.LinearGeneral, *_CONVOLUTIONS)
MakeModule = Callable[[nnx.Rngs], nnx.Module]


def fake_quantize(
  make_module: MakeModule, *, pattern: str = "", activations: bool = True
) -> MakeModule:
  """Returns a function that makes modules which compute with int8 and are trained in float.

  Args:
    make_module: `nnx.Rngs -> module`. Names and shapes of its parameters stay, so that weights of a
      float student fit.
    pattern: regular expression found in the paths of the layers to round, such as 'blocks/'; "" is
      found in all.
    activations: whether the inputs of kernels are int8 too; without, only kernels are.

  Raises:
    ImportError: qwix is not installed.
    ValueError: when a module is made, a pattern that fits no linear layer or convolution.
  """
  qwix = _import_qwix()

  def make_fake(rngs: nnx.Rngs) -> nnx.Module:
    module = make_module(rngs)
    _matching_layers(module, pattern)
    provider = qwix.QtProvider(_rules(qwix, pattern, activations))
    return qwix.quantize_model(module, provider, skip_nnx_init=True)

  return make_fake


def quantize(
  make_module: MakeModule,
  variables: Variables,
  *inputs: Any,
  pattern: str = "",
  activations: bool = True,
) -> nnx.Module:
  """Returns a module whose kernels are int8, from the weights of a float or fake-quantized student.

  Args:
    make_module: as for `fake_quantize`.
    variables: the trained variables.
    *inputs: arguments of the module's call, such as images; only shapes and dtypes matter.
    pattern: as for `fake_quantize`.
    activations: as for `fake_quantize`. Convolutions need True: qwix has none with only int8
      kernels.

  Returns:
    The module, for `from_nnx`, whose Model then has its variables. The Model of a module made with
    any other variables loads their export.

  Raises:
    ImportError: qwix is not installed.
    ValueError: a pattern that fits no linear layer or convolution, or convolutions without
      activations.
  """
  qwix = _import_qwix()
  module = make_module(nnx.Rngs(0))
  layers = _matching_layers(module, pattern)
  convolutions = [path for path, layer in layers.items() if isinstance(layer, _CONVOLUTIONS)]
  if convolutions and not activations:
    raise ValueError(
      f"activations: expected True for convolutions, got False with {convolutions[0]}: give "
      "activations=True, or a pattern without convolutions"
    )
  nnx.update(module, variables.params)
  nnx.update(module, variables.state)
  # qwix calls the module once, which would update the statistics of batch norm in training.
  module.eval()
  provider = qwix.PtqProvider(_rules(qwix, pattern, activations))
  # qwix takes a NumPy array for no array.
  return qwix.quantize_model(module, provider, *jax.tree.map(jnp.asarray, inputs))


def _import_qwix() -> Any:
  try:
    import qwix
  except ImportError as error:
    raise ImportError(f"quantization needs qwix: {install_hint('qwix')}") from error
  return qwix


def _rules(qwix: Any, pattern: str, activations: bool) -> list:
  dtypes = {"weight_qtype": jnp.int8, "act_qtype": jnp.int8 if activations else None}
  # The two providers round the inputs of an einsum differently, so it stays float.
  return [qwix.QuantizationRule(module_path=f".*(?:{pattern}).*", op_names=_LAYERS, **dtypes)]


def _matching_layers(module: nnx.Module, pattern: str) -> dict[str, nnx.Module]:
  """Returns the layers with a kernel whose paths the pattern fits; others have nothing to round."""
  layers: dict[str, nnx.Module] = {
    "/".join(map(str, path)): layer
    for path, layer in compat.iter_modules(module)
    if isinstance(layer, _KERNELS)
  }
  matching = {path: layer for path, layer in layers.items() if re.search(pattern, path)}
  if not matching:
    raise ValueError(
      f"pattern: expected one that fits a linear layer or convolution, {', '.join([*layers][:8])}, "
      f"..., got {pattern!r}"
    )
  return matching
