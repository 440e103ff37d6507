"""Runs the command line: `python -m distill_jax`."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from distill_jax.errors import naming_extras


def main() -> None:
  """Runs a command and exits; see `distill_jax.jobs.cli.run`."""
  with _ending_at_signals(), naming_extras():
    from distill_jax.jobs.cli import run
  run()


@contextlib.contextmanager
def _ending_at_signals() -> Iterator[None]:
  """Lets SIGTERM and Ctrl-C end the process with a line while Python imports, which takes seconds.

  They end it at once: an exception could be caught by the module that is being imported.
  """
  defaults = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
  # A shell's background commands ignore Ctrl-C, and this one stays so.
  handlers = {number: old for number, old in defaults.items() if signal.getsignal(number) == old}
  for number in handlers:
    signal.signal(number, _end)
  try:
    yield
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
  del frame
  name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
  line = f"distill-jax: {name}: stopped before anything began; the same command starts it\n"
  os.write(2, line.encode())
  os._exit(128 + number)


if __name__ == "__main__":
  main()
