"""The process that compiles for a TPU ends with the one that started it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

PARENT = """
import sys
from distill_jax.cost import child
child.run_child([sys.executable, "-c", sys.argv[1]])
"""
CHILD = """
import os, time
from distill_jax.cost import child
child.end_with_parent()
open({file!r}, "w").write(str(os.getpid()))
time.sleep(600)
"""


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the state of processes")
def test_child_ends_where_its_parent_is_killed(tmp_path):
  pid_file = tmp_path / "pid"
  code = CHILD.format(file=str(pid_file))
  parent = subprocess.Popen([sys.executable, "-c", PARENT, code])
  try:
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
  finally:
    parent.kill()
    parent.wait()
  wait_until(lambda: not is_running(int(pid_file.read_text())))


def wait_until(condition, seconds=60):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


def is_running(pid):
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
