"""Checks what a function of numpy arrays returned."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.trees import describe_leaf

Arrays = dict[str, np.ndarray]
Specs = dict[str, jax.ShapeDtypeStruct]


def check_arrays(outputs: Any, rows: int) -> Arrays:
  """Checks that a function returned numpy arrays by name, with a row for each example."""
  if not isinstance(outputs, Mapping) or not outputs:
    raise ValueError(
      "predict: expected a dict of numpy arrays by name, got "
      f"{type(outputs).__name__ if outputs is not None else None}"
      f"{' without entries' if isinstance(outputs, Mapping) else ''}: return {{'logits': array}}"
    )
  for name, values in outputs.items():
    if not isinstance(values, np.ndarray):
      kind = f"{type(values).__module__.split('.')[0]}.{type(values).__name__}"
      fix = "x.detach().cpu().numpy()" if kind.startswith("torch.") else "np.asarray(x)"
      raise ValueError(f"predict: expected numpy arrays, got a {kind} as {name!r}: return {fix}")
    if not _fits_device(values.dtype):
      raise ValueError(
        f"predict: expected numbers of at most 32 bits, got {values.dtype} as {name!r}: cast it, "
        "such as x.astype(np.float32)"
      )
    if values.ndim == 0 or len(values) != rows:
      raise ValueError(
        f"predict: expected {rows} rows in {name!r}, one for each example of the batch, got the "
        f"shape {list(values.shape)}: return the rows of all examples in their order"
      )
  return dict(outputs)


def _fits_device(dtype: np.dtype) -> bool:
  """Returns whether JAX has the dtype, under its present setting of 64 bits."""
  is_number = jnp.issubdtype(dtype, jnp.number) or dtype == np.bool_
  return is_number and jax.dtypes.canonicalize_dtype(dtype) == dtype


def check_specs(outputs: Arrays, specs: Specs) -> None:
  """Checks that outputs are of the names, dtypes and shapes that earlier calls had."""
  expected = {name: describe_leaf(x.shape, x.dtype) for name, x in sorted(specs.items())}
  actual = {name: describe_leaf(x.shape, x.dtype) for name, x in sorted(outputs.items())}
  if actual != expected:
    raise ValueError(
      f"predict: expected the outputs {expected}, as for zeros of the same shapes, got {actual}: "
      "return the same names, dtypes and shapes of a row for every batch"
    )
