"""Two trainers never write in one folder: who is refused, who is succeeded, and who notices that he was."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from distill_jax.storage import lease
from distill_jax.storage.lease import NAME, Lease, LeaseError

CHILD = """
import sys
from distill_jax.storage import lease
lease._kernel = lambda: sys.argv[2]
holding = lease.Lease(sys.argv[1], renew_every=0.05)
with holding:
  print("holding", flush=True)
  sys.stdin.readline()
  try:
    holding.check()
  except lease.LeaseError as error:
    print(error, flush=True)
"""


@pytest.fixture
def trainer(tmp_path):
  """A process that holds the folder and, told so, checks that it does."""
  started = []

  def start(kernel):
    command = [sys.executable, "-c", CHILD, str(tmp_path), kernel]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    started.append(child)
    assert child.stdout.readline() == "holding\n"
    return child

  yield start
  for child in started:
    child.kill()
    child.communicate()


def never(*_):
  raise AssertionError("it waited")


def signed(folder, **changes):
  """A lease as another process would sign it."""
  owner = {
    **lease._identity(),
    "host": "elsewhere",
    "pid": 4,
    "kernel": "other",
    "token": "theirs",
    **changes,
  }
  (folder / NAME).write_text(json.dumps(owner))
  return owner


def test_a_folder_has_one_owner_who_gives_it_back(tmp_path, monkeypatch):
  monkeypatch.setattr(lease.time, "sleep", never)
  folder = tmp_path / "a" / "run"
  with Lease(folder) as first:
    owner = (
      f"belongs to process {os.getpid()} on {socket.gethostname()}, since .*, which is running"
    )
    with pytest.raises(LeaseError, match=f"the folder {folder} {owner}"):
      Lease(folder).__enter__()
    first.check()
    with Lease(folder / "student-0"), Lease(folder.parent):
      first.check()
  assert not (folder / NAME).exists()
  with first:
    first.check()
  assert list(folder.iterdir()) == [folder / "student-0"]


def test_it_is_given_back_after_an_error(tmp_path):
  with pytest.raises(KeyError), Lease(tmp_path):
    raise KeyError
  assert not (tmp_path / NAME).exists()


def test_a_killed_process_on_this_machine_is_succeeded_at_once(tmp_path, trainer, monkeypatch):
  monkeypatch.setattr(lease.time, "sleep", never)
  child = trainer(lease._kernel())
  with pytest.raises(LeaseError, match=f"process {child.pid} on"):
    Lease(tmp_path).__enter__()
  child.kill()  # it stays a zombie until it is waited for
  os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
  with Lease(tmp_path):
    pass
  child.wait()
  signed(tmp_path, kernel=lease._kernel(), pid=os.getpid(), start="0")  # its number is used again
  with Lease(tmp_path):
    pass


def test_an_owner_elsewhere_is_left_alone_while_it_renews(tmp_path, trainer, capfd):
  child = trainer("another machine")
  with pytest.raises(LeaseError, match=f"process {child.pid} on .* is running"):
    Lease(tmp_path, patience=60).__enter__()
  assert "waiting 60 s for a sign of life" in capfd.readouterr().err
  child.communicate("go on\n")
  assert child.returncode == 0 and not (tmp_path / NAME).exists()


@pytest.mark.parametrize("content", ["of another machine", "", '{"pid": 3}', "[]"])
def test_an_owner_elsewhere_that_does_not_renew_is_succeeded(tmp_path, content):
  signed(tmp_path)
  if content != "of another machine":  # torn, or written by something else
    (tmp_path / NAME).write_text(content)
  with Lease(tmp_path, patience=0.2) as taken:
    taken.check()
  assert list(tmp_path.iterdir()) == []


def test_of_many_that_wait_for_one_dead_owner_one_succeeds_it(tmp_path):
  signed(tmp_path)
  together = threading.Barrier(8)

  def run(_):
    together.wait()
    try:
      with Lease(tmp_path, patience=0.2) as taken:
        taken.check()
        together.wait()
        taken.check()
        return "held"
    except LeaseError as error:
      together.wait()
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    ended = list(pool.map(run, range(8)))
  assert ended.count("held") == 1
  assert sum("is running" in text for text in ended) == 7
  assert list(tmp_path.iterdir()) == []


def test_a_suspended_owner_notices_that_it_was_succeeded(tmp_path, trainer):
  child = trainer("another machine")
  child.send_signal(signal.SIGSTOP)
  with Lease(tmp_path, renew_every=0.05, patience=0.3) as taken:
    child.send_signal(signal.SIGCONT)
    said, _ = child.communicate("check\n")
    assert f"belongs to process {os.getpid()} on" in said and "it was taken over meanwhile" in said
    taken.check()


def test_a_lease_of_somebody_else_is_not_removed(tmp_path):
  with Lease(tmp_path, renew_every=0.01) as lost:
    theirs = signed(tmp_path)
    for _ in range(2):
      with pytest.raises(LeaseError, match="process 4 on elsewhere.* not to this process any more"):
        lost.check()
  assert json.loads((tmp_path / NAME).read_text()) == theirs


def test_a_lease_that_vanished_is_signed_again(tmp_path):
  with Lease(tmp_path) as holding:
    (tmp_path / NAME).unlink()
    holding.check()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_who_was_faster_keeps_what_another_moved_away(tmp_path):
  with Lease(tmp_path) as owner:
    late = Lease(tmp_path)
    late._remove(b"what the dead owner had signed")
    assert json.loads((tmp_path / NAME).read_text())["token"] == owner._own["token"]
    owner.check()
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match="the folder .*file/run cannot be written"):
    Lease(tmp_path / "file" / "run").__enter__()
