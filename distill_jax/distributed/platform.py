"""Returns the platform that a step is traced for, another than this process' if compiled ahead."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_PLATFORM: contextvars.ContextVar[str] = contextvars.ContextVar("platform", default="")


def target_platform() -> str:
  """Returns 'cpu', 'gpu' or 'tpu': the platform of `tracing_for`, else `jax.default_backend()`.

  Only functions that are traced again for each program may call it: a trace that jax caches keeps
  the answer for the other platform.
  """
  return _PLATFORM.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(platform: str) -> Iterator[None]:
  """Sets `target_platform` while a program is traced for a platform that need not be there."""
  token = _PLATFORM.set(platform)
  try:
    yield
  finally:
    _PLATFORM.reset(token)
