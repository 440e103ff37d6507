"""What a file of weights must say about itself so that damage, mix-ups and misfits are noticed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax

from distill_jax.storage.fingerprint import checksums
from distill_jax.trees import named_leaves
from distill_jax.types import TrainState, Tree

Identity = Mapping[str, str | int | float]
Layout = Mapping[str, tuple[tuple[int, ...], str]]


class CorruptFile(Exception):
  """What was read must not be used; the text says why."""


def make(state: TrainState, metrics: Mapping[str, float], identity: Identity) -> dict[str, Any]:
  """The seal of a state: plain values that json can hold, with a digest over all of them.

  Raises:
    ValueError: a leaf would not come back as it is: it is no `jax.Array`, its type is weak (arithmetic with
      it would give other dtypes after a restore), or it shares its name with another one.
  """
  for name, leaf in named_leaves(state):
    if not isinstance(leaf, jax.Array):
      raise ValueError(f"leaf {name} is {type(leaf).__name__}, expected jax.Array")
    if getattr(leaf, "weak_type", False):  # typed keys have none
      raise ValueError(
        f"leaf {name} is weakly typed and would come back as {leaf.dtype}: use jnp.array(x, dtype)"
      )
  shapes, sums = layout(state), checksums(state)
  body = {
    "step": int(state.step),
    "leaves": {name: [list(shape), dtype, sums[name]] for name, (shape, dtype) in shapes.items()},
    "metrics": {name: float(value) for name, value in metrics.items()},
    "identity": dict(identity),
  }
  return {"seal": body, "digest": _digest(body)}


def opened(stored: Mapping[str, Any] | None, step: int) -> dict[str, Any]:
  """The values of a stored seal.

  Raises:
    CorruptFile: there is none, it was changed, or it is another step's.
  """
  if not stored or not {"seal", "digest"} <= set(stored):
    raise CorruptFile("it has no seal: its metadata is damaged, or something else wrote it")
  body = stored["seal"]
  if _digest(body) != stored["digest"]:
    raise CorruptFile("its seal is broken")
  if body["step"] != step:
    raise CorruptFile(f"its seal says step {body['step']}: the directory was renamed")
  return body


def check_contents(seal: Mapping[str, Any], tree: Tree) -> None:
  """Compare shape, dtype and every bit of the leaves with what was sealed.

  Raises:
    CorruptFile: some differ.
  """
  shapes, sums = layout(tree), checksums(tree)
  sealed = {
    name: (tuple(shape), dtype, total) for name, (shape, dtype, total) in seal["leaves"].items()
  }
  broken = [name for name in sealed if sealed[name] != (*shapes[name], sums[name])]
  if broken:
    raise CorruptFile(
      f"{len(broken)} of {len(sealed)} leaves are not what was saved: {', '.join(broken[:5])}"
    )


def check_identity(seal: Mapping[str, Any], identity: Identity) -> None:
  """Refuse another run's state.

  Raises:
    ValueError: with a line for each field that differs, old and new.
  """
  old, new = seal["identity"], dict(identity)
  absent = "(not given)"
  lines = [
    f"\n  {field}: {old.get(field, absent)!r} when it was saved, {new.get(field, absent)!r} now"
    for field in {**old, **new}
    if old.get(field, absent) != new.get(field, absent)
  ]
  if lines:
    raise ValueError(f"another run saved it:{''.join(lines)}")


def check_fit(expected: Layout, found: Layout) -> None:
  """Refuse leaves that are missing, unexpected, or of another shape or dtype.

  Raises:
    ValueError: with a line for each of them.
  """
  lines = [f"\n  missing: {name} {_show(expected[name])}" for name in expected if name not in found]
  lines += [
    f"\n  unexpected: {name} {_show(found[name])}" for name in found if name not in expected
  ]
  lines += [
    f"\n  differs: {name} is {_show(found[name])}, expected {_show(expected[name])}"
    for name in expected
    if name in found and _show(found[name]) != _show(expected[name])
  ]
  if lines:
    raise ValueError(f"its leaves do not fit:{''.join(lines)}")


def layout(tree: Tree) -> dict[str, tuple[tuple[int, ...], str]]:
  """`{name: (shape, dtype)}` of every leaf.

  Raises:
    ValueError: two leaves have one name.
  """
  leaves: dict[str, tuple[tuple[int, ...], str]] = {}
  for name, leaf in named_leaves(tree):
    if name in leaves:
      raise ValueError(f"two leaves are named {name}: a key contains '/'")
    leaves[name] = tuple(leaf.shape), str(leaf.dtype)
  return leaves


def _show(leaf) -> str:
  shape, dtype = leaf
  return f"{dtype}[{','.join(map(str, shape))}]"


def _digest(body: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
