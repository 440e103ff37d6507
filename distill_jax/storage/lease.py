"""A lease on a folder, so that two trainers never write in it at once: a small file, renewed while its owner lives.

Nothing but creating a file exclusively and renaming is asked of the file system, so that mounted ones will do.
No two machines' clocks are compared: who waits watches whether the file changes, by his own clock.
"""

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_jax.distributed import hosts
from distill_jax.storage import files

NAME = ".lease"


class LeaseError(OSError):
  """The folder belongs to another trainer; the text says to which."""


class Lease:
  """Holds a folder while the `with` block runs; leases of nested folders do not clash.

  A process that was killed on this machine is succeeded at once. Any other owner is watched: if the lease is not
  renewed for `patience` seconds, it is taken over. With several processes in one run the first holds it for all;
  they enter, check and leave together.
  """

  def __init__(
    self, folder: str | os.PathLike, *, renew_every: float = 10.0, patience: float = 60.0
  ):
    """Nothing is taken yet.

    Args:
      folder: made if it is missing.
      renew_every: seconds between renewals.
      patience: seconds without a renewal after which an owner elsewhere counts as dead; the same for all
        trainers of a folder, and several renewals long.
    """
    self.folder = Path(folder).absolute()
    self._renew_every, self._patience = renew_every, patience
    self._own = _identity()
    self._path = self.folder / NAME
    self._lock, self._stop = threading.Lock(), threading.Event()
    self._renewer: threading.Thread | None = None
    self._lost: str | None = None

  def __enter__(self) -> "Lease":
    """Takes the lease.

    Raises:
      LeaseError: the folder belongs to a running trainer.
      OSError: the folder cannot be made or written.
    """
    hosts.run_on_first(self._take)
    return self

  def __exit__(self, *_) -> None:
    """Gives it back; no other process is waited for, since it may be the one that failed."""
    if self._renewer is None:
      return
    self._stop.set()
    self._renewer.join()
    self._renewer = None
    with contextlib.suppress(OSError):
      if self._owner() == self._own:
        self._path.unlink()

  def check(self) -> None:
    """Call it before what must not happen twice (a checkpoint).

    Raises:
      LeaseError: another trainer took the folder over while this process was suspended or cut off.
      OSError: the file system does not answer.
    """
    hosts.run_on_first(self._confirm)

  def _take(self) -> None:
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      self._wait()
    except LeaseError:
      raise
    except OSError as error:
      raise OSError(f"the folder {self.folder} cannot be written: {error}") from error
    self._stop.clear()
    self._renewer = threading.Thread(
      target=self._renew, name=f"lease of {self.folder}", daemon=True
    )
    self._renewer.start()

  def _wait(self) -> None:
    """Returns when the lease is ours."""
    seen, since = None, time.monotonic()
    while not self._create():
      content = self._read()
      if content is None:
        continue  # given back just now
      owner = _parsed(content)
      if seen is None:
        seen, living = content, _lives(owner)
        if living is None:
          print(
            f"{self._says(owner)}: waiting {self._patience:.0f} s for a sign of life",
            file=sys.stderr,
          )
      if content != seen or living:
        raise LeaseError(
          f"{self._says(owner)}, which is running: stop it, or choose another folder"
        )
      if living is False or time.monotonic() - since > self._patience:
        self._remove(content)
      else:
        time.sleep(min(1.0, self._patience / 20))

  def _create(self) -> bool:
    try:
      descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
      return False
    with open(descriptor, "wb") as file:
      file.write(self._content())
      file.flush()
      os.fsync(file.fileno())
    return True

  def _remove(self, content: bytes) -> None:
    """Removes a dead owner's lease; of several who try, one renames this very file."""
    aside = self._path.with_name(f"{NAME}.{self._own['token']}")
    try:
      os.rename(self._path, aside)
    except FileNotFoundError:
      return
    if aside.read_bytes() != content:  # somebody was faster, and this is theirs
      with contextlib.suppress(OSError):  # then its owner misses it, and makes it again
        os.link(aside, self._path)
    aside.unlink()

  def _renew(self) -> None:
    while not self._stop.wait(self._renew_every):
      with contextlib.suppress(
        OSError
      ):  # told by `check`; a mount that fails for a moment is no reason to stop
        self._confirm()
        with self._lock:
          files.write(self._path, self._content())

  def _confirm(self) -> None:
    with self._lock:
      while self._lost is None:
        content = self._read()
        if content is None and self._create():
          return
        if content is not None:
          owner = _parsed(content)
          if owner == self._own:
            return
          self._lost = (
            f"{self._says(owner)}, and not to this process any more: it was taken over meanwhile"
          )
    raise LeaseError(self._lost)

  def _owner(self) -> Mapping[str, Any]:
    return _parsed(self._read() or b"")

  def _read(self) -> bytes | None:
    try:
      return self._path.read_bytes()
    except FileNotFoundError:
      return None

  def _content(self) -> bytes:
    return json.dumps({**self._own, "renewed": time.time_ns()}).encode()

  def _says(self, owner: Mapping[str, Any]) -> str:
    who = (
      "process {pid} on {host}, since {since}".format_map(owner)
      if owner
      else "somebody who has not signed"
    )
    return f"the folder {self.folder} belongs to {who}"


def _identity() -> dict[str, Any]:
  """Who holds a lease; `kernel` is equal where process numbers mean the same."""
  return {
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    "kernel": _kernel(),
    "start": _start(os.getpid()),
    "token": uuid.uuid4().hex,
  }


def _kernel() -> str | None:
  try:
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return None


def _start(pid: int) -> str | None:
  """When a process began, in the kernel's ticks; None: there is none, or it has ended."""
  try:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return None
  return None if fields[0] in "ZX" else fields[19]


def _lives(owner: Mapping[str, Any]) -> bool | None:
  """Whether the process runs; None: it cannot be told from here."""
  if not owner or owner["kernel"] is None or owner["kernel"] != _kernel():
    return None
  start = _start(owner["pid"])
  if start is None and _hidden(owner["pid"]):
    return None
  return start == owner["start"]


def _hidden(pid: int) -> bool:
  """Whether there is such a process, of another user's."""
  try:
    os.kill(pid, 0)
  except PermissionError:
    return True
  except OSError:
    return False
  return False


def _parsed(content: bytes) -> dict[str, Any]:
  """Who signed; nobody where the file is empty or damaged."""
  try:
    signed = json.loads(content)
    return {name: signed[name] for name in ("host", "pid", "since", "kernel", "start", "token")}
  except (ValueError, KeyError, TypeError):
    return {}
