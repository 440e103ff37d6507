"""Leases a folder, so that two trainers never write in it at once.

A lease is a small file that its owner renews. It needs only exclusive creation and renaming of
files, so mounted file systems will do. Clocks of two machines are never compared: a waiting process
watches by its own clock whether the file changes. The file gets its name when it is complete, and
is renewed in place: an owner that was suspended in a renewal writes into its own, removed file.
"""

import contextlib
import errno
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_jax.distributed import hosts
from distill_jax.storage import folders, owner

NAME = ".lease"
_MAX_SIZE = 2**16
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class LeaseError(OSError):
  """Raised where the folder belongs to another trainer, which the text names."""


class Lease:
  """A folder that belongs to this process while the `with` block runs; nested folders do not clash.

  The lease of a process that was killed on this machine is taken over at once, and so is that in a
  copy of a folder. Any other owner is
  watched: if it does not renew the lease for `patience` seconds, the lease is taken over. With
  several processes in one run the first one holds it for all; they enter, check and leave together.
  """

  def __init__(
    self, folder: str | os.PathLike, *, renew_every: float = 10.0, patience: float = 60.0
  ):
    """Takes nothing yet.

    Args:
      folder: created if it is missing.
      renew_every: seconds between renewals.
      patience: seconds without a renewal after which an owner on another machine counts as dead;
        the same for all trainers of a folder, and several renewals long.
    """
    self.folder = folders.resolve(folder, "folder")
    self._renew_every = renew_every
    self._patience = patience
    self._owner = owner.describe_process(self.folder)
    self._path = self.folder / NAME
    self._lock = threading.Lock()
    self._stop = threading.Event()
    self._renewer: threading.Thread | None = None
    self._loss: str | None = None
    self._last_seen = _clocks()

  def __enter__(self) -> "Lease":
    """Takes the lease.

    Raises:
      LeaseError: the folder belongs to a running trainer.
      OSError: the folder cannot be created or written.
    """
    hosts.run_on_first(self._take)
    return self

  def __exit__(self, *_) -> None:
    """Removes the lease, without waiting for other processes: one of them may have failed."""
    if self._renewer is None:
      return
    self._stop.set()
    self._renewer.join()
    self._renewer = None
    with contextlib.suppress(OSError):
      content = self._read() or b""
      if owner.parse(content) == self._owner:
        self._remove(content)

  def check(self) -> None:
    """Checks that the lease still belongs to this process; call it before each checkpoint.

    Raises:
      LeaseError: another trainer took the folder over while this process was suspended or cut off.
      OSError: the file system does not answer.
    """
    hosts.run_on_first(self._confirm)

  def _take(self) -> None:
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      self._acquire()
      self._last_seen = _clocks()
    except LeaseError:
      raise
    except OSError as error:
      raise OSError(f"folder: expected a writable one, got {self.folder}: {error}") from error
    self._stop.clear()
    self._renewer = threading.Thread(
      target=self._renew, name=f"lease of {self.folder}", daemon=True
    )
    self._renewer.start()

  def _acquire(self) -> None:
    """Creates the file, once it does not exist or its owner is dead.

    Raises:
      LeaseError: its owner is alive.
    """
    first_content = None
    alive: bool | None = None
    start = time.monotonic()
    while not self._create():
      content = self._read()
      if content is None:
        # It was removed in between.
        continue
      signature = owner.parse(content)
      if first_content is None:
        first_content = content
        alive = False if self._is_copy(signature) else owner.is_alive(signature)
        if alive is None:
          text = f"waiting {self._patience:.0f} s for a renewal: {self._belongs_to(signature)}"
          print(text, file=sys.stderr)
      if content != first_content or alive:
        text = f"{self._belongs_to(signature)}, which is running: stop it, or use another folder"
        raise LeaseError(text)
      if alive is False or time.monotonic() - start > self._patience:
        self._remove(content)
      else:
        time.sleep(min(1.0, self._patience / 20))

  def _is_copy(self, signature: Mapping[str, Any]) -> bool:
    """Whether the folder was copied while its owner trains in the original one, on this machine."""
    original = Path(signature.get("folder", ""))
    if not signature or not owner.is_alive(signature) or original == self.folder.resolve():
      return False
    try:
      # One folder may have two paths.
      same = original.samefile(self.folder)
      stored = owner.parse((original / NAME).read_bytes())
    except OSError:
      return False
    return not same and stored.get("token") == signature["token"]

  def _create(self) -> bool:
    """Creates the file with its content, unless it exists."""
    temporary = self._path.with_name(f"{NAME}.{self._owner['token']}.new")
    try:
      with open(temporary, "wb") as file:
        file.write(self._content())
        file.flush()
        os.fsync(file.fileno())
      os.link(temporary, self._path)
    except FileExistsError:
      return False
    except OSError as error:
      if error.errno not in _NO_LINKS:
        raise
      return self._create_without_links()
    finally:
      temporary.unlink(missing_ok=True)
    return True

  def _create_without_links(self) -> bool:
    try:
      descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
      return False
    with open(descriptor, "wb") as file:
      try:
        file.write(self._content())
        file.flush()
        os.fsync(file.fileno())
      except BaseException:
        self._path.unlink(missing_ok=True)
        raise
      # While it was empty, another process may have taken it for a dead owner's.
      content = self._read()
      return content is not None and owner.parse(content) == self._owner

  def _remove(self, content: bytes) -> None:
    """Removes the lease of this content; of several processes that try, one renames this file."""
    aside = self._path.with_name(f"{NAME}.{self._owner['token']}")
    try:
      os.rename(self._path, aside)
    except FileNotFoundError:
      return
    if _read_start(aside) != content:
      # Another process was faster, and this is its lease. If linking fails, it notices and creates
      # it again.
      with contextlib.suppress(OSError):
        os.link(aside, self._path)
    aside.unlink()

  def _renew(self) -> None:
    while not self._stop.wait(self._renew_every):
      # `check` raises these; a mount that fails for a moment is no reason to stop renewing.
      with contextlib.suppress(OSError):
        self._confirm()
        self._write_renewal()

  def _write_renewal(self) -> None:
    with open(self._path, "rb+") as file:
      if owner.parse(file.read()) == self._owner:
        os.pwrite(file.fileno(), self._content(), 0)

  def _confirm(self) -> None:
    with self._lock:
      while self._loss is None:
        content = self._read()
        if content is None and self._seconds_unseen() > self._patience:
          self._loss = (
            f"folder: the lease of {self.folder} was removed while this process did not run: "
            "another one may have trained there; start again"
          )
        elif content is not None or self._create():
          signature = self._owner if content is None else owner.parse(content)
          if signature == self._owner:
            self._last_seen = _clocks()
            return
          self._loss = f"{self._belongs_to(signature)}, which took it over from this process"
    raise LeaseError(self._loss)

  def _seconds_unseen(self) -> float:
    return max(now - then for now, then in zip(_clocks(), self._last_seen))

  def _read(self) -> bytes | None:
    try:
      return _read_start(self._path)
    except FileNotFoundError:
      return None

  def _content(self) -> bytes:
    return json.dumps({**self._owner, "renewed": time.time_ns()}).encode()

  def _belongs_to(self, signature: Mapping[str, Any]) -> str:
    text = "an unknown process"
    if signature:
      text = "process {pid} on {host}, since {since}".format_map(signature)
    return f"folder: {self.folder} belongs to {text}"


def _read_start(path: Path) -> bytes:
  """Returns the content of a lease; of a larger file, which is none, the start."""
  with path.open("rb") as file:
    return file.read(_MAX_SIZE)


def _clocks() -> tuple[float, float]:
  """Returns seconds of both clocks; while a machine is suspended, one of them may stand."""
  return time.monotonic(), time.time()
