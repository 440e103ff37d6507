"""Seals a train state with a checksum of every leaf; detects corrupt and mismatched checkpoints."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from distill_jax.storage.fingerprint import checksums
from distill_jax.trees import describe_leaf, named_leaves
from distill_jax.types import TrainState, Tree

Identity = Mapping[str, str | int | float]
Layout = Mapping[str, tuple[tuple[int, ...], str]]
"""`{name: (shape, dtype)}` of the leaves of a tree."""


class CorruptFile(Exception):
  """A stored checkpoint whose content must not be used; the text gives the reason."""


def make_seal(
  state: TrainState,
  metrics: Mapping[str, float],
  identity: Identity,
  settings: Mapping[str, str] | None = None,
  notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns `{"seal": values that json can hold, "digest": hash of the seal}` of a state.

  Raises:
    ValueError: a leaf would not come back the same: it is no `jax.Array`, its type is weak
      (arithmetic with it would give other dtypes after a restore), or two leaves have one name.
  """
  for name, leaf in named_leaves(state):
    if not isinstance(leaf, jax.Array):
      raise ValueError(f"{name}: expected a jax.Array, got {type(leaf).__name__}: use jnp.asarray")
    # Typed keys have no weak type.
    if getattr(leaf, "weak_type", False):
      raise ValueError(
        f"{name}: expected a strong dtype, got a weakly typed {leaf.dtype}: use jnp.array(x, dtype)"
      )
  sums = checksums(state)
  body = {
    "step": int(state.step),
    "leaves": {
      name: [list(shape), dtype, sums[name]] for name, (shape, dtype) in layout(state).items()
    },
    "metrics": {name: float(value) for name, value in metrics.items()},
    "identity": dict(identity),
    "settings": dict(settings or {}),
    "notes": dict(notes or {}),
  }
  return {"seal": body, "digest": _digest(body)}


def open_seal(metadata: Mapping[str, Any] | None, step: int) -> dict[str, Any]:
  """Returns the seal in the metadata of a checkpoint.

  Raises:
    CorruptFile: there is none, it was changed, or it is the seal of another step.
  """
  if not metadata or not {"seal", "digest"} <= set(metadata):
    raise CorruptFile(
      "seal: expected one, got none: its metadata is corrupt, or not of distill_jax"
    )
  body = metadata["seal"]
  if _digest(body) != metadata["digest"]:
    raise CorruptFile("digest: the seal was changed after it was written")
  if body["step"] != step:
    raise CorruptFile(f"step: expected {step}, got {body['step']}: the directory was renamed")
  return body


def check_contents(seal: Mapping[str, Any], tree: Tree) -> None:
  """Compares shape, dtype and every bit of the leaves with what was sealed.

  Raises:
    CorruptFile: some leaves differ.
  """
  sums = checksums(tree)
  leaves = {name: (*leaf, sums[name]) for name, leaf in layout(tree).items()}
  sealed = {name: (tuple(shape), *rest) for name, (shape, *rest) in seal["leaves"].items()}
  different = [name for name in sealed if sealed[name] != leaves[name]]
  if different:
    raise CorruptFile(
      f"{len(different)} of {len(sealed)} leaves differ from what was saved: "
      f"{', '.join(different[:5])}"
    )


def check_usable(
  path: Path,
  seal: Mapping[str, Any],
  like: TrainState,
  identity: Identity | None,
  settings: Mapping[str, str] | None,
) -> None:
  """Checks that a checkpoint is of this run, and that its leaves are those of `like`.

  Args:
    path: of the checkpoint, for the error.
    seal: of the checkpoint.
    like: the state of a fresh start.
    identity: of this run; None: it is not compared.
    settings: of this run; the flags among them (x64) may be why leaves differ. None: none.

  Raises:
    ValueError: with a line for each difference.
  """
  stored = {name: (shape, dtype) for name, (shape, dtype, _) in seal["leaves"].items()}
  try:
    if identity is not None:
      check_identity(seal, identity)
    check_layout(layout(like), stored)
  except ValueError as error:
    flags = [line for line in changed_settings(seal, settings) if "." not in line.partition(":")[0]]
    raise ValueError(
      f"checkpoint {path} cannot be restored (name another folder, or mend what differs): {error}"
      + "".join(f"\n  {line}" for line in flags)
    ) from None


def changed_settings(seal: Mapping[str, Any], settings: Mapping[str, str] | None) -> list[str]:
  """Returns a text for each setting that differs; none where none is compared."""
  return [] if settings is None else _differences(seal["settings"], settings)


def check_identity(seal: Mapping[str, Any], identity: Identity) -> None:
  """Checks that a checkpoint is of this run.

  Raises:
    ValueError: with a line for each field that differs, old and new.
  """
  lines = [f"\n  {line}" for line in _differences(seal["identity"], identity)]
  if lines:
    raise ValueError(f"another run saved it:{''.join(lines)}")


def check_layout(expected: Layout, stored: Layout) -> None:
  """Checks that no leaf is missing, unexpected, or of another shape or dtype.

  Raises:
    ValueError: with a line for each such leaf.
  """
  before = {name: describe_leaf(*leaf) for name, leaf in expected.items()}
  now = {name: describe_leaf(*leaf) for name, leaf in stored.items()}
  lines = [f"\n  missing: {name} {leaf}" for name, leaf in before.items() if name not in now]
  lines += [f"\n  unexpected: {name} {leaf}" for name, leaf in now.items() if name not in before]
  lines += [
    f"\n  differs: {name} is {now[name]}, expected {leaf}"
    for name, leaf in before.items()
    if name in now and now[name] != leaf
  ]
  if lines:
    raise ValueError(f"its leaves do not fit:{''.join(lines)}")


def layout(tree: Tree) -> dict[str, tuple[tuple[int, ...], str]]:
  """Returns `{name: (shape, dtype)}` of every leaf.

  Raises:
    ValueError: two leaves have one name.
  """
  leaves: dict[str, tuple[tuple[int, ...], str]] = {}
  for name, leaf in named_leaves(tree):
    if name in leaves:
      raise ValueError(f"{name}: expected one leaf of this name, got two: a key contains '/'")
    leaves[name] = tuple(leaf.shape), str(leaf.dtype)
  return leaves


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  absent = "(not given)"
  return [
    f"{field}: {old.get(field, absent)} when it was saved, {new.get(field, absent)} now"
    for field in {**old, **new}
    if old.get(field, absent) != new.get(field, absent)
  ]


def _digest(body: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
