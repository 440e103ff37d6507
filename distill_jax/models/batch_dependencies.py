"""Finds the entries of a batch that a function's results depend on."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.interpreters import partial_eval


def entries_read(
  function: Callable[..., Any], variables: Any, batch: Mapping[str, Any]
) -> set[str]:
  """Returns the names of a batch's entries that a function's results depend on.

  Args:
    function: `(variables, batch) -> arrays`; it is traced, not run.
    variables, batch: arrays or `ShapeDtypeStruct`s.

  >>> import numpy as np
  >>> batch = {"image": np.ones((2, 3)), "label": np.ones(2)}
  >>> entries_read(lambda w, batch: w * batch["image"], 2.0, batch)
  {'image'}
  """
  names = sorted(batch)
  jaxpr = jax.make_jaxpr(lambda values, variables: function(variables, dict(zip(names, values))))(
    [batch[name] for name in names], variables
  ).jaxpr
  _, is_read = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return {name for name, read in zip(names, is_read) if read}
