"""Says which flag or field a misspelt one may mean."""

from collections.abc import Sequence

from distill_jax.errors import nearest_names

_MEANINGS = {
  "lr": "learning_rate",
  "eta": "learning_rate",
  "bs": "batch_size",
  "batch": "batch_size",
  "wd": "weight_decay",
  "num_epochs": "epochs",
  "iterations": "steps",
  "max_steps": "steps",
  "num_steps": "steps",
  "t": "temperature",
  "tau": "temperature",
  "seed": "seeds",
  "output_dir": "workdir",
  "out": "workdir",
  "folder": "workdir",
}
"""Usual names of other tools, and the names of the same things here."""


def nearest(name: str, known: Sequence[str]) -> list[str]:
  """Returns the names of `known` that a person may have meant, best first; maybe none.

  Args:
    name: a flag or a dotted field, with underscores.
    known: flags, or dotted fields, of which the last part counts as well.
  """
  parent, _, last = name.rpartition(".")
  meant = _MEANINGS.get(last.lower(), last)
  same = _named(meant, known)
  if not same and "." not in name:
    # 'batchsize' is nearer to the last part of 'student_training.batch_size' than to all of it.
    parts = nearest_names(meant, sorted({other.split(".")[-1] for other in known}))
    same = [other for part in parts for other in _named(part, known)]
  siblings = [other for other in same if parent and other.rpartition(".")[0] == parent]
  return siblings or same or nearest_names(name, known)


def _named(last: str, known: Sequence[str]) -> list[str]:
  return [other for other in known if other.split(".")[-1] == last]
