"""Ties a trained network to what it was made from: its data, and the weights that it read."""

from pathlib import Path
from typing import Any

from distill_jax.jobs import data
from distill_jax.jobs.config import ConfigError
from distill_jax.jobs.identity import differences
from distill_jax.jobs.plan import RESULT, Job, Network, train_data
from distill_jax.storage import files, sealed_json
from distill_jax.storage.student import WEIGHTS

LINEAGE = "lineage"
"""The entry of result.json with what `lineage` returned when the network was trained."""


def train_digest(job: Job, role: str) -> str:
  """Returns the digest of what all networks of a role are trained on."""
  return data.digest(train_data(job, role))


def lineage(job: Job, network: Network, train: str) -> dict[str, str]:
  """Returns digests of a network's training and validation data, of its teacher's weights and of
  those that it starts from; '' where it has none.

  Args:
    job, network: whose lineage it is.
    train: `train_digest` of the network's role, which reads all examples.
  """
  return {
    "train": train,
    "validation": data.digest(job.splits.validation),
    "teacher": _digest_of(network.teacher_folder),
    "init_from": _digest_of(network.init_folder),
  }


def read_result(network: Network) -> dict[str, Any]:
  """Returns the content of a finished network's result.json.

  Raises:
    ConfigError: it was changed since it was written.
  """
  path = network.folder / RESULT
  try:
    return sealed_json.read(path, "seconds", "steps", LINEAGE)
  except ValueError as error:
    raise ConfigError(
      f"{error}: delete {path}, and the same command writes it again from the checkpoints"
    ) from error


def check_lineage(job: Job, network: Network, train: str) -> None:
  """Checks that a finished network was made from the data and weights that the job has now.

  Raises:
    ConfigError: it was not, or its result.json was changed.
  """
  stored = read_result(network)[LINEAGE]
  lines = differences(stored, lineage(job, network, train))
  if lines:
    raise ConfigError(
      f"{network.name}: expected a network made from what the command has now, got a finished one "
      f"in {network.folder} made from other data or weights:\n  "
      + "\n  ".join(lines)
      + "\ntake another --workdir, or delete that folder to train it again"
    )


def _digest_of(folder: Path | None) -> str:
  """Returns 32 hexadecimal digits of exported weights."""
  if folder is None or not (folder / WEIGHTS).exists():
    return ""
  return files.digest(folder / WEIGHTS)
