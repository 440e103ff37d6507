"""The command before its libraries are imported."""

import subprocess
import sys

import pytest

INTERRUPTED_IMPORT = """
import os, runpy, signal, sys

class Interrupting:
  def find_spec(self, name, *_):
    if name == "jax":
      os.kill(os.getpid(), signal.{name})

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
runpy.run_module("distill_jax", run_name="__main__")
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_signal_while_python_imports_ends_with_a_line(name, code):
  script = INTERRUPTED_IMPORT.format(name=name)
  command = [sys.executable, "-c", script]
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  assert result.returncode == code
  assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("distill-jax: ")
