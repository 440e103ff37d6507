"""Runs a sampler on batches of a source, with rows sharded over the devices."""

import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax.cache.sequence_level.candidates import TokenLimits, to_columns
from distill_jax.distributed import sharding
from distill_jax.errors import naming_missing
from distill_jax.models.adapters.kinds import wrong_kind
from distill_jax.types import Batch, Variables

Columns = dict[str, np.ndarray]


class Decoder(NamedTuple):
  """A teacher's sampler that returns columns.

  Attributes:
    start: `(batch, worker) -> finish` begins to decode a batch, and `finish() -> (columns, {})`
      waits for it; the worker is not used.
    num_ahead: number of batches to start before the first one is finished.
  """

  start: Callable[[Batch, Executor | None], Callable[[], tuple[Columns, Columns]]]
  num_ahead: int = 1


def make_decoder(
  sampler: Callable[..., Any],
  variables: Variables,
  key: jax.Array | None,
  names: Sequence[str],
  limits: TokenLimits,
  mesh: jax.sharding.Mesh,
) -> Decoder:
  """Returns a sampler with its weights on the devices.

  Args:
    sampler, variables, key: as for `seq_kd`.
    names: entries that the sampler gets, next to 'id'.
    limits: what tokens it may return.
    mesh: rows are sharded over its axis `data`.

  Raises:
    ValueError: `sampler` is no function, or `variables` are no `Variables`.
  """
  if not callable(sampler):
    raise wrong_kind("sampler", "a function (Variables, key, batch) -> (tokens, lengths)", sampler)
  if not isinstance(variables, Variables):
    raise ValueError(
      f"variables: expected Variables(params, state), got {type(variables).__name__}: write "
      "types.Variables(params, {})"
    )
  placed = sharding.replicate(variables, mesh)
  rows = sharding.row_sharding(mesh)
  leading = (placed, jax.random.key(0) if key is None else key)
  arguments = leading if _takes_key(sampler) else leading[:1]

  def start(batch: Batch, worker: Executor | None) -> Callable[[], tuple[Columns, Columns]]:
    del worker
    entries = {name: batch[name] for name in ("id", *names)}
    with naming_missing("an entry that the sampler reads, one of inputs=", entries):
      result = sampler(*arguments, jax.device_put(entries, rows))
    return lambda: (to_columns(result, np.asarray(batch["id"]), limits), {})

  return Decoder(start)


def _takes_key(sampler: Callable[..., Any]) -> bool:
  """Returns whether a sampler is called with a key; a beam search needs two arguments only."""
  try:
    signature = inspect.signature(sampler)
    signature.bind(None, None)
  except (TypeError, ValueError):  # It needs a third one, or is a function of C.
    return True
  kinds = {parameter.kind for parameter in signature.parameters.values()}
  return inspect.Parameter.VAR_POSITIONAL in kinds
