"""Stores compiled programs on disk, so that a resumed run does not compile again.

jax trusts what it reads: without a checksum a flipped bit gives another program. Each entry ends
with one here, after the bytes that jax itself stores.
"""

import hashlib
import os
import warnings
from pathlib import Path

import jax
from jax._src import compilation_cache as jax_cache
from jax._src.compilation_cache_interface import CacheInterface
from jax.experimental.compilation_cache import compilation_cache

_MARK = b"distill_jax sha256 "
_CHECKSUM_BYTES = len(_MARK) + hashlib.sha256().digest_size
_get_file_cache = jax_cache.get_file_cache


def enable_compilation_cache(folder: str | Path) -> str:
  """Turns on jax's persistent cache, for programs that take a second or more to compile.

  Call it before anything is compiled. Any user who may write to the cache may run code here: jax
  trusts its content. A corrupt entry is removed with a warning, and compiled again; so is one
  without a checksum, which another program stored in a shared folder.

  Args:
    folder: folder of the run; programs are stored in its `compiled`. The environment variable
      JAX_COMPILATION_CACHE_DIR takes precedence: a folder or a URL (`gs://`) that all hosts, and
      all runs, may share.

  Returns:
    Where the programs are stored.
  """
  location = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path(folder) / "compiled")
  jax.config.update("jax_compilation_cache_dir", location)
  jax_cache.get_file_cache = _checked_file_cache
  # jax reads the location only once.
  compilation_cache.reset_cache()
  return location


class CheckedCache(CacheInterface):
  """jax's cache of compiled programs, with a checksum at the end of each entry."""

  def __init__(self, cache: CacheInterface):
    self._cache = cache
    self._path = cache._path

  def get(self, key: str) -> bytes | None:
    value = self._cache.get(key)
    if value is None:
      return None
    program, checksum = value[:-_CHECKSUM_BYTES], value[-_CHECKSUM_BYTES:]
    if checksum == _checksum(program):
      return program
    if checksum.startswith(_MARK):
      text = f"{self._path}: the compiled program {key} is corrupt and is compiled again"
      warnings.warn(text, RuntimeWarning, stacklevel=2)
    # jax would keep it, and never store the new one.
    (self._path / f"{key}-cache").unlink(missing_ok=True)
    return None

  def put(self, key: str, value: bytes) -> None:
    self._cache.put(key, value + _checksum(value))


def _checked_file_cache(path: str) -> tuple[CacheInterface, str] | None:
  found = _get_file_cache(path)
  return None if found is None else (CheckedCache(found[0]), found[1])


def _checksum(program: bytes) -> bytes:
  return _MARK + hashlib.sha256(program).digest()
