"""Describes the process that owns a lease, and checks whether such a process is still alive."""

import datetime
import json
import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FIELDS = {
  "host": str,
  "pid": int,
  "since": str,
  "folder": str,
  "kernel": str | None,
  "start": str | None,
  "token": str,
}


def describe_process(folder: Path) -> dict[str, Any]:
  """Returns the description of this process as owner of a folder; no two calls return the same
  token.
  """
  return {
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    "folder": str(folder.resolve()),
    "kernel": _kernel(),
    "start": _start_time(os.getpid()),
    "token": uuid.uuid4().hex,
  }


def parse(content: bytes) -> dict[str, Any]:
  """Returns a process' description from json; an empty one if the text is corrupt."""
  try:
    stored = json.loads(content)
    description = {name: stored[name] for name in _FIELDS}
  except (ValueError, KeyError, TypeError, RecursionError):
    return {}
  is_valid = all(isinstance(description[name], kind) for name, kind in _FIELDS.items())
  return description if is_valid and 0 < description["pid"] < 2**31 else {}


def is_alive(description: Mapping[str, Any]) -> bool | None:
  """Returns whether the process runs; None: this machine cannot see it."""
  if not description or description["kernel"] is None or description["kernel"] != _kernel():
    return None
  start = _start_time(description["pid"])
  if start is None and _is_of_another_user(description["pid"]):
    return None
  return start == description["start"]


def _kernel() -> str | None:
  """Returns a text that is equal where process numbers mean the same; None: unknown."""
  try:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return None


def _start_time(pid: int) -> str | None:
  """Returns when a process started, in ticks of the kernel; None: it does not run."""
  try:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return None
  return None if fields[0] in "ZX" else fields[19]


def _is_of_another_user(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except PermissionError:
    return True
  except OSError:
    return False
  return False
