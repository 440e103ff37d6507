"""Names the losses of `tokens`, and checks its arguments and targets."""

import inspect
from typing import Any

from distill_jax import losses
from distill_jax.errors import check_integer, suggest
from distill_jax.losses import SparseTargets
from distill_jax.objectives.hyperparameters import check_number, check_types
from distill_jax.objectives.loss_checks import name_of

LIVE = {  # a loss of live logits: its name in `losses.linear_kl`
  losses.kl_divergence: "kl",
  losses.reverse_kl: "reverse_kl",
  losses.jensen_shannon: "jensen_shannon",
  losses.skew_kl: "skew_kl",
  losses.skew_reverse_kl: "skew_reverse_kl",
}
CACHED = {  # a loss of `SparseTargets`: its name in `losses.linear_sparse_kl`
  losses.sparse_kl: "bucket",
  losses.sparse_kl_conditional: "conditional",
  losses.sampled_cross_entropy: "sampled",
}


def check_arguments(loss, label_weight, temperature, memory, targets, options) -> frozenset[str]:
  """Checks the arguments of `tokens`; returns the names of options that are schedules."""
  if not any(loss is supported for supported in (*LIVE, *CACHED)):
    raise ValueError(
      f"loss: expected one of {_names(LIVE)} (a live teacher), {_names(CACHED)} (a cached one) or "
      f"None, got {loss if isinstance(loss, str) else name_of(loss)!r}"
    )
  if not isinstance(targets, str):
    raise ValueError(f"targets: expected the name of an output, got {targets!r}: leave it out")
  check_number("label_weight", label_weight, low=0)
  if temperature is not None:
    check_number("temperature", temperature, low=0, open_low=True)
  if memory is not None:
    check_integer("memory", memory, 1)
  fused = losses.linear_kl if loss in LIVE else losses.linear_sparse_kl
  hyperparameters = {*inspect.signature(loss).parameters, "axis_name"}
  supported = hyperparameters & set(inspect.signature(fused).parameters)
  for name in options:
    if name not in supported:
      raise ValueError(
        f"{name}: expected an option of {name_of(loss)} that {name_of(fused)} supports, got "
        f"{name!r}{suggest(name, supported)}"
      )
  return check_types(fused, options)


def check_no_teacher(**arguments: Any) -> None:
  """Raises a `ValueError` for an argument that needs a loss."""
  for name, value in arguments.items():
    if value is not None and not (name == "label_weight" and value is not False and value == 0):
      raise ValueError(
        f"{name}: expected none without a loss, got {value!r}: the labels' weight is the term's"
      )


def check_cached(loss, stored: SparseTargets, temperature, targets: str) -> None:
  """Raises a `ValueError` where the loss or the temperature does not fit stored targets."""
  if loss not in CACHED:
    raise ValueError(
      f"loss: expected one of {_names(CACHED)} for the cached teacher's {targets!r}, got "
      f"{name_of(loss)}: it compares with a live teacher"
    )
  if stored.sampled is not None and stored.sampled != (CACHED[loss] == "sampled"):
    kind = "random samples (sample_k)" if stored.sampled else "the top k classes (top_k)"
    fitting = [f for f in CACHED if (CACHED[f] == "sampled") == stored.sampled]
    raise ValueError(
      f"loss: expected {_names(fitting)} for {targets!r}, which are {kind}, got {name_of(loss)}"
    )
  if callable(temperature) or temperature not in (None, stored.temperature):
    raise ValueError(
      f"temperature: expected {stored.temperature}, the cached teacher's for {targets!r}, got "
      f"{temperature}: leave temperature out"
    )


def check_live(loss) -> None:
  """Raises a `ValueError` for a loss of stored targets."""
  if loss not in LIVE:
    raise ValueError(
      f"loss: expected one of {_names(LIVE)} for a live teacher, got {name_of(loss)}: it compares "
      "with the SparseTargets of a cache"
    )


def _names(functions) -> str:
  return ", ".join(name_of(function) for function in functions)
