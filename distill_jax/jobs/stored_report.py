"""Remembers what a report was written from, so that an equal one is not written again."""

import hashlib
import json
from pathlib import Path
from typing import Any

from distill_jax.jobs import data
from distill_jax.jobs.plan import RESULT, ROLES, Job, networks
from distill_jax.storage import files, sealed_json
from distill_jax.storage.fingerprint import fingerprint
from distill_jax.storage.student import WEIGHTS

FOLDER = "report"
_FILE = "outcome.json"
_IDENTITY = ("config", "settings", "code", "versions", "device")


def report_digest(job: Job) -> str:
  """Returns a hash of all that a job's report depends on."""
  teacher = job.teacher_model
  complete = [n for role in ROLES for n in networks(job, role) if n.complete]
  names = (RESULT, WEIGHTS, "metrics.jsonl")
  return _hash(
    {
      "run": {name: job.run.get(name) for name in _IDENTITY},
      "test": data.digest(job.splits.test),
      "teacher": "" if teacher is None else fingerprint(teacher.variables),
      "networks": {n.name: [_digest_of(n.folder / name) for name in names] for n in complete},
    }
  )


def stored_outcome(job: Job, digest: str) -> str | None:
  """Returns the outcome of the report with this digest; None where it must be written."""
  folder = job.folder / FOLDER
  try:
    stored = sealed_json.read(folder / _FILE, "report", "outcome")
  except (OSError, ValueError):
    return None  # It is written again.
  is_same = stored["report"] == digest and (folder / "report.html").exists()
  return stored["outcome"] if is_same else None


def store_outcome(job: Job, digest: str, outcome: str) -> None:
  """Stores the text in which a report resulted, for `stored_outcome`."""
  folder = job.folder / FOLDER
  folder.mkdir(parents=True, exist_ok=True)
  files.write(folder / _FILE, sealed_json.dumps({"report": digest, "outcome": outcome}))


def _hash(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _digest_of(path: Path) -> str:
  return files.digest(path) if path.exists() else ""
