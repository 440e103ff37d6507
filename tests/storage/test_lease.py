"""Two trainers never write in one folder: which one is rejected, taken over, and notices it."""

import concurrent.futures
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from distill_jax.storage import lease, owner
from distill_jax.storage.lease import NAME, Lease, LeaseError

CHILD = """
import sys
from distill_jax.storage import lease, owner
owner._kernel = lambda: sys.argv[2]
folder = lease.Lease(sys.argv[1], renew_every=0.5)
with folder:
  print("entered", flush=True)
  sys.stdin.readline()
  try:
    folder.check()
  except lease.LeaseError as error:
    print(error, flush=True)
"""


@pytest.fixture
def trainer(tmp_path):
  """Starts a process that leases the folder and, after a line of input, checks its lease."""
  children = []

  def start(kernel):
    command = [sys.executable, "-c", CHILD, str(tmp_path), kernel]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    children.append(child)
    assert child.stdout.readline() == "entered\n"
    return child

  yield start
  for child in children:
    child.kill()
    child.communicate()


def never(*_):
  raise AssertionError("it waited")


def write_lease(folder, **changes):
  """Writes a lease as another process would, and returns its owner."""
  other = {"host": "elsewhere", "pid": 4, "kernel": "other", "token": "theirs"}
  description = {**owner.describe_process(folder), **other, **changes}
  # A renewal must not read a half of it.
  (folder / "new").write_text(json.dumps(description))
  os.replace(folder / "new", folder / NAME)
  return description


def test_one_owner_at_a_time_who_gives_it_back(tmp_path, monkeypatch):
  monkeypatch.setattr(lease.time, "sleep", never)
  folder = tmp_path / "a" / "run"
  with Lease(folder) as first:
    with pytest.raises(LeaseError, match=rf"folder: {folder} .* {os.getpid()} "):
      Lease(folder).__enter__()
    first.check()
    with Lease(folder / "student-0"), Lease(folder.parent):
      first.check()
  assert not (folder / NAME).exists()
  with first:
    first.check()
  assert list(folder.iterdir()) == [folder / "student-0"]


def test_lease_is_given_back_after_an_error(tmp_path):
  with pytest.raises(KeyError), Lease(tmp_path):
    raise KeyError
  assert not (tmp_path / NAME).exists()


def test_killed_process_on_this_machine_is_replaced_at_once(tmp_path, trainer, monkeypatch):
  monkeypatch.setattr(lease.time, "sleep", never)
  child = trainer(owner._kernel())
  with pytest.raises(LeaseError, match=rf"process {child.pid} on"):
    Lease(tmp_path).__enter__()
  # It stays a zombie until it is waited for.
  child.kill()
  os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
  with Lease(tmp_path):
    pass
  child.wait()
  # Its number is used again, by a process that started at another time.
  write_lease(tmp_path, kernel=owner._kernel(), pid=os.getpid(), start="0")
  with Lease(tmp_path):
    pass


def test_remote_owner_is_replaced_only_without_renewals(tmp_path, trainer, capfd):
  child = trainer("another machine")
  with pytest.raises(LeaseError, match=rf"process {child.pid} on"):
    Lease(tmp_path, patience=60).__enter__()
  assert f"process {child.pid} on" in capfd.readouterr().err
  # Right after a renewal: one that is interrupted writes over a later lease when it resumes.
  content = (tmp_path / NAME).read_bytes()
  while (tmp_path / NAME).read_bytes() == content:
    time.sleep(0.01)
  child.send_signal(signal.SIGSTOP)
  os.waitid(os.P_PID, child.pid, os.WSTOPPED)
  with Lease(tmp_path, renew_every=0.05, patience=0.3) as ours:
    child.send_signal(signal.SIGCONT)
    output, _ = child.communicate("check\n")
    assert f"process {os.getpid()} on" in output
    ours.check()


@pytest.mark.parametrize(
  "content", ["of another machine", "", '{"pid": 3}', "[" * 100_000, "\0" * 10**7, "\x80\n\r"]
)
def test_remote_owner_without_renewals_is_replaced(tmp_path, content):
  write_lease(tmp_path)
  # The others are incomplete, or written by something else.
  if content != "of another machine":
    (tmp_path / NAME).write_text(content)
  with Lease(tmp_path, patience=0.2) as ours:
    ours.check()
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "changes",
  [{"pid": "4"}, {"pid": None}, {"pid": -1}, {"pid": 2**70}, {"start": 5}, {"host": [1]}],
  ids=lambda changes: str(changes),
)
def test_an_owner_of_other_types_is_unknown(tmp_path, changes):
  write_lease(tmp_path, **{"kernel": owner._kernel()} | changes)
  with Lease(tmp_path, patience=0.05) as ours:
    ours.check()
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_a_full_disk_leaves_no_lease(tmp_path, monkeypatch, links):
  seen = []

  def fail(_):
    seen.append((tmp_path / NAME).exists())
    raise OSError(errno.ENOSPC, "No space left on device")

  if not links:
    monkeypatch.setattr(lease.os, "link", no_links)
  with monkeypatch.context() as patch:
    if links:
      patch.setattr(Lease, "_content", fail)
    else:
      patch.setattr(lease.os, "fsync", fail)
    with pytest.raises(OSError, match="folder: .*No space left"):
      Lease(tmp_path).__enter__()
  assert not list(tmp_path.iterdir())
  assert links is False or seen == [False]  # Others never see an empty one.
  with Lease(tmp_path) as ours:
    ours.check()


def no_links(*_):
  raise PermissionError(errno.EPERM, "no links")


def test_without_links_a_lease_that_was_taken_while_empty_is_not_ours(tmp_path, monkeypatch):
  monkeypatch.setattr(lease.os, "link", no_links)
  ours = Lease(tmp_path)
  content = ours._content

  def take_away():
    if (tmp_path / NAME).exists():
      (tmp_path / NAME).unlink()
      write_lease(tmp_path)
    return content()

  monkeypatch.setattr(ours, "_content", take_away)
  assert not ours._create()


def test_an_owner_that_was_suspended_in_a_renewal_changes_no_later_lease(tmp_path, monkeypatch):
  with Lease(tmp_path, renew_every=1000) as ours:
    content = ours._content

    def take_over():
      (tmp_path / NAME).rename(tmp_path / "aside")
      take_over.theirs = write_lease(tmp_path)
      return content()

    monkeypatch.setattr(ours, "_content", take_over)
    ours._write_renewal()
    assert json.loads((tmp_path / NAME).read_text()) == take_over.theirs
    with pytest.raises(LeaseError, match="process 4 on elsewhere"):
      ours.check()


def test_a_lease_that_was_removed_in_a_long_pause_is_lost(tmp_path, monkeypatch):
  """Another process may have taken it over, trained on, and left."""
  with Lease(tmp_path, renew_every=1000, patience=60) as ours:
    (tmp_path / NAME).unlink()
    now = time.time()
    monkeypatch.setattr(lease.time, "time", lambda: now + 61)
    for _ in range(2):
      with pytest.raises(LeaseError, match="folder: "):
        ours.check()
  assert not list(tmp_path.iterdir())


def test_remote_owner_is_replaced_after_the_patience(tmp_path, monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(lease.time, "monotonic", lambda: clock[0])
  monkeypatch.setattr(lease.time, "sleep", lambda seconds: clock.append(clock.pop() + seconds))
  write_lease(tmp_path)
  with Lease(tmp_path, patience=60):
    assert 60 < clock[0] <= 62


@pytest.mark.parametrize("content", ["of another machine", ""])
def test_one_of_eight_waiting_processes_gets_the_lease(tmp_path, content):
  write_lease(tmp_path)
  if not content:
    (tmp_path / NAME).write_text("")
  barrier = threading.Barrier(8)

  def run(_):
    barrier.wait()
    try:
      with Lease(tmp_path, patience=0.2) as ours:
        ours.check()
        barrier.wait()
        ours.check()
        return True
    except LeaseError:
      barrier.wait()
      return False

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    results = list(pool.map(run, range(8)))
  assert results.count(True) == 1
  assert list(tmp_path.iterdir()) == []


def test_copy_of_a_leased_folder_is_another_folder(tmp_path, monkeypatch):
  monkeypatch.setattr(lease.time, "sleep", never)
  original, copy, link = tmp_path / "run", tmp_path / "copy", tmp_path / "link"
  with Lease(original):
    shutil.copytree(original, copy)
    link.symlink_to(original)
    with pytest.raises(LeaseError):
      Lease(link).__enter__()
    with Lease(copy) as second:
      second.check()
      with pytest.raises(LeaseError):
        Lease(copy).__enter__()


def test_moved_folder_still_belongs_to_its_owner(tmp_path, monkeypatch):
  monkeypatch.setattr(lease.time, "sleep", never)
  with Lease(tmp_path / "run"):
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(LeaseError):
      Lease(tmp_path / "moved").__enter__()
    (tmp_path / "moved").rename(tmp_path / "run")


def test_lease_of_another_process_is_not_removed(tmp_path):
  with Lease(tmp_path, renew_every=0.01) as lost:
    # A renewal at the same moment writes over it.
    while lost._loss is None:
      theirs = write_lease(tmp_path)
      time.sleep(0.05)
    for _ in range(2):
      with pytest.raises(LeaseError, match=r"folder: .*process 4 on elsewhere"):
        lost.check()
  assert json.loads((tmp_path / NAME).read_text()) == theirs


def test_removed_lease_is_created_again(tmp_path):
  with Lease(tmp_path) as ours:
    (tmp_path / NAME).unlink()
    ours.check()
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_faster_process_keeps_a_lease_that_another_moved(tmp_path):
  with Lease(tmp_path) as faster:
    slower = Lease(tmp_path)
    slower._remove(b"the lease of the dead owner")
    assert json.loads((tmp_path / NAME).read_text())["token"] == faster._owner["token"]
    faster.check()
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_folder_that_cannot_be_created_raises(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match=r"folder: .*file/run"):
    Lease(tmp_path / "file" / "run").__enter__()
