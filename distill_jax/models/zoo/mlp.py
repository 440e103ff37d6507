"""Defines a multi-layer perceptron."""

from collections.abc import Sequence

import jax
from flax import nnx

from distill_jax.types import Outputs


class MLP(nnx.Module):
  """Linear layers with ReLU between them, for rows of values or small images.

  Outputs:
    hidden1, hidden2, ...: [B, widths[0]], [B, widths[1]], ...: after the ReLU, before dropout.
    logits: [B, classes].
  """

  def __init__(
    self,
    inputs: int,
    widths: Sequence[int],
    classes: int,
    *,
    dropout: float = 0.0,
    dtype=None,
    rngs: nnx.Rngs,
  ):
    """Builds the layers with He initialization (He et al. 2015, equation 10).

    Args:
      inputs: number of values per example: H * W * C for images.
      widths: units of each hidden layer; () is a linear classifier.
      classes: number of logits.
      dropout: probability that a hidden unit is dropped, in training; 0 needs no random stream.
      dtype: dtype of the computation and the outputs; parameters are float32. None: that of the
        input, float32 or wider.
      rngs: streams `params` and, with dropout, `dropout`.
    """
    he = nnx.initializers.he_normal()
    sizes = (inputs, *widths)
    self.hidden = nnx.data(
      [nnx.Linear(a, b, kernel_init=he, dtype=dtype, rngs=rngs) for a, b in zip(sizes, sizes[1:])]
    )
    self.dropout = nnx.Dropout(dropout, rngs=rngs if dropout else None)
    self.head = nnx.Linear(sizes[-1], classes, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> Outputs:
    """Returns the outputs of a batch [B, ...], flattened per example.

    Raises:
      ValueError: an example does not have `inputs` values.
    """
    first = self.hidden[0] if self.hidden else self.head
    flat = x.reshape(x.shape[0], -1)
    if flat.shape[-1] != first.in_features:
      raise ValueError(
        f"inputs: expected {first.in_features} values an example, got {flat.shape[-1]} in {x.shape}"
      )
    outputs = {}
    x = flat
    for number, layer in enumerate(self.hidden, 1):
      outputs[f"hidden{number}"] = nnx.relu(layer(x))
      x = self.dropout(outputs[f"hidden{number}"])
    return {**outputs, "logits": self.head(x)}
