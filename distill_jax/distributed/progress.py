"""Keeps a progress bar below all that is written to its terminal meanwhile."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def writing_above(bar: tqdm) -> Iterator[None]:
  """Lets warnings, logging and `print` appear above a bar, in whole lines.

  The streams stay, and their `write` is replaced: handlers of logging keep the stream that they got
  when they were made. A disabled bar changes nothing.
  """
  streams = {} if bar.disable else {id(stream): stream for stream in (sys.stdout, sys.stderr)}
  with contextlib.ExitStack() as stack:
    for stream in streams.values():
      if stream.isatty():
        lines = _Lines(bar, stream.write)
        stack.callback(lines.close)
        stack.callback(setattr, stream, "write", stream.write)
        setattr(stream, "write", lines.write)  # noqa: B010 (mypy)
    yield


class _Lines:
  """Writes lines above a bar; the beginning of one waits for its end."""

  def __init__(self, bar: tqdm, write: Callable[[str], int]):
    self._bar, self._write, self._beginning = bar, write, ""

  def write(self, text: str) -> int:
    with self._bar.get_lock():
      lines, end, self._beginning = (self._beginning + text).rpartition("\n")
      if end:
        with self._bar.external_write_mode(self._bar.fp):
          self._write(lines + end)
    return len(text)

  def close(self) -> None:
    if self._beginning:
      with self._bar.external_write_mode(self._bar.fp):
        self._write(self._beginning + "\n")
