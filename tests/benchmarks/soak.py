"""Disturbs a whole job at random, and counts what is silent, stuck or named.

python tests/benchmarks/soak.py [MINUTES] [SEED]

The job is configs/digits.py with small networks: teacher, baseline, student, report. Each event
kills it, stops it, fills its disk, flips a bit of one of its files, or takes one of two processes
away. Then the same command runs to its end. Its weights and evaluations must be those of an
undisturbed run ('equal'), or a line must say what is wrong ('named'). Exits with 1 where a
difference was 'silent' or a process 'stuck'.

Runs begin with the compiled programs of the undisturbed one, so that most of the time is spent on
what is disturbed. The disk is a tmpfs where this user may mount one, else a limit of the size of
files. It is mounted in a namespace of this command: no end of it, not even SIGKILL, leaves it
behind.
"""

import collections
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import small_digits
from spawning import ROOT, spawn

from distill_jax.distributed.lost_process import LOST_PROCESS_CODE

STUCK = 10
"""Times that an undisturbed run takes, after which a process is stuck."""
FIELDS = {
  "teacher_width": 0.5,
  "teacher_training.steps": 20,
  "student_training.steps": 20,
  "eval_every": 5,
  "log_every": 5,
}
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
}
_NAMESPACE = "DISTILL_JAX_SOAK_NAMESPACE"


class Soak:
  """A job in a folder on a disk of its own, the outcome of an undisturbed run, and counts."""

  def __init__(self, folder: Path, seed: int):
    self.random = random.Random(seed)
    self.disk = folder / "disk"
    self.disk.mkdir()
    self.is_mounted = mount(self.disk)
    fields = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    self.flags = [f"--config={small_digits.write(folder)}", *fields]
    self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
    self.processes: list[subprocess.Popen] = []
    self.seconds = 120.0
    self.run = folder / "undisturbed"
    self.expected: dict[str, object] = {}
    self.expected_of_two: dict[str, object] = {}

  def prepare(self) -> None:
    """Runs the job undisturbed, and again with its compiled programs on the small disk."""
    self.undisturbed()
    self.expected = outcome(self.run)
    shutil.copytree(self.run / "compiled", self.disk / "run" / "compiled")
    self.run = self.disk / "run"
    self.seconds = self.undisturbed()
    assert outcome(self.run) == self.expected
    clear(self.run)

  def undisturbed(self) -> float:
    """Runs the job to its end; returns the time that it took."""
    start = time.monotonic()
    code, text = self.finish(self.start())
    assert code == 0, text
    return time.monotonic() - start

  def close(self) -> collections.Counter[str]:
    """Ends what still runs; prints and returns the counts."""
    for process in self.processes:
      if process.poll() is None:
        process.kill()
        process.communicate()
    if self.is_mounted:  # The folder of a mounted disk cannot be removed.
      subprocess.run(["umount", "-l", str(self.disk)], check=False)
    verdicts = collections.Counter({"silent": 0, "stuck": 0})
    for (kind, verdict), count in sorted(self.counts.items()):
      print(f"| {kind} | {verdict} | {count} |")
      verdicts[verdict] += count
    print(dict(verdicts), flush=True)
    return verdicts

  def start(self, file_bytes: int | None = None) -> subprocess.Popen:
    """Starts the command, whose files may not be longer than `file_bytes`."""
    command = [sys.executable, "-m", "distill_jax", *self.flags, f"--workdir={self.run}"]
    process = subprocess.Popen(
      command,
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      preexec_fn=None if file_bytes is None else lambda: limit_files(file_bytes),
    )
    self.processes.append(process)
    return process

  def finish(self, process: subprocess.Popen) -> tuple[int | None, str]:
    """Returns a command's exit code and output; None: it was stuck, and is killed."""
    try:
      output = process.communicate(timeout=max(120, STUCK * self.seconds))[0]
      return process.returncode, output
    except subprocess.TimeoutExpired:
      process.kill()
      return None, process.communicate()[0]

  def disturb(self, kind: str) -> None:
    """Disturbs the job once, lets it resume, and counts how it ended."""
    {
      "kill": lambda: self.signal(signal.SIGKILL, (-signal.SIGKILL,)),
      "SIGTERM": lambda: self.signal(signal.SIGTERM, (128 + signal.SIGTERM, -signal.SIGTERM)),
      "full disk": self.fill_disk,
      "flip": self.flip,
      "lost process": self.lose,
    }[kind]()
    if kind != "lost process":
      self.judge(kind, *self.finish(self.start()))

  def judge(self, kind: str, code: int | None, text: str) -> None:
    """Counts the end of a command; a folder that it refuses is cleared, as its line asks."""
    if code == 0:
      verdict = "equal" if outcome(self.run) == self.expected else "silent"
    elif code is None:
      verdict = "stuck"
    else:
      verdict = "named" if is_named(text) else "traceback"
    self.count(kind, verdict, text)
    if verdict != "equal" or self.random.random() < 0.7:
      clear(self.run)

  def count(self, kind: str, verdict: str, text: str) -> None:
    self.counts[kind, verdict] += 1
    last = text.strip().splitlines()[-1:] if verdict != "equal" else []
    print(f"{kind}: {verdict}", *last, flush=True)

  def signal(self, number: int, codes: tuple[int, ...]) -> None:
    process = self.start()
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(self.random.uniform(0, self.seconds))
    process.send_signal(number)
    code, text = self.finish(process)
    if code not in (0, *codes):
      self.judge(f"{signal.Signals(number).name} itself", code, text)

  def fill_disk(self) -> None:
    filler = self.disk / "filler"
    free = self.random.randrange(600_000)
    if self.is_mounted:
      filler.write_bytes(bytes(max(0, shutil.disk_usage(self.disk).free - free)))
    code, text = self.finish(self.start(None if self.is_mounted else free))
    filler.unlink(missing_ok=True)
    if code != 0:
      verdict = "stuck" if code is None else "named" if is_named(text) else "traceback"
      self.count("full disk itself", verdict, text)

  def flip(self) -> None:
    self.signal(signal.SIGKILL, (-signal.SIGKILL,))
    files = [path for path in self.run.rglob("*") if path.is_file() and path.stat().st_size]
    if not files:
      return
    # The name first: there are more compiled programs than other files.
    name = self.random.choice(sorted({path.relative_to(self.run).parts[0] for path in files}))
    path = self.random.choice([path for path in files if self.run / name in (path, *path.parents)])
    content = bytearray(path.read_bytes())
    content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
    path.write_bytes(content)
    print("flip:", path.relative_to(self.run), flush=True)

  def lose(self) -> None:
    """Kills one of two processes; the other one must end with 75, or both were at their end."""
    script, folder = ROOT / "tests/distributed/command.py", self.disk / "two"
    processes = spawn(2, script, *self.flags, f"--workdir={folder}", devices=2)
    self.processes += processes
    victim = self.random.randrange(2)
    with contextlib.suppress(subprocess.TimeoutExpired):
      processes[victim].wait(self.random.uniform(0, 2 * self.seconds))
    processes[victim].kill()
    code, text = self.finish(processes[1 - victim])
    processes[victim].communicate()
    verdict = {None: "stuck", 0: "equal", LOST_PROCESS_CODE: "named"}.get(code, "other code")
    if verdict == "equal":
      self.expected_of_two = self.expected_of_two or outcome(folder)
      verdict = "equal" if outcome(folder) == self.expected_of_two else "silent"
    if verdict != "named":
      clear(folder)
    self.count("lost process", verdict, text)


def outcome(run: Path) -> dict[str, object]:
  """Returns digests of the exported weights, and the evaluations of all networks."""
  result: dict[str, object] = {}
  for path in sorted(run.glob("*/model.safetensors")):
    name = path.parent.name
    result[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    result[f"{name} result"] = json.loads((path.parent / "result.json").read_text())["validation"]
  return result


def is_named(text: str) -> bool:
  """Whether a command ended with a line of its own in place of a traceback."""
  return text.strip().splitlines()[-1:] != [] and "distill-jax: " in text.strip().splitlines()[-1]


def clear(run: Path) -> None:
  """Removes all but the compiled programs."""
  for path in run.glob("*"):
    if path.name != "compiled":
      shutil.rmtree(path) if path.is_dir() else path.unlink()


def mount(folder: Path) -> bool:
  """Mounts a small disk, in a namespace of this process only; returns whether it could."""
  command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
  return _NAMESPACE in os.environ and succeeds(command)


def succeeds(command: list[str]) -> bool:
  try:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
  except OSError:
    return False


def enter_namespace() -> None:
  """Starts this command again where its mounts end with it, if this user may."""
  if _NAMESPACE not in os.environ and succeeds(["unshare", "--mount", "true"]):
    os.environ[_NAMESPACE] = "1"
    os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])


def limit_files(size: int) -> None:
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def main(minutes: float = 30, seed: int = 0) -> int:
  """Returns the exit code."""
  kinds = ["kill", "SIGTERM", "full disk", "flip", "lost process"]
  signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
  with tempfile.TemporaryDirectory(prefix="soak_", ignore_cleanup_errors=True) as name:
    soak = Soak(Path(name), seed)
    try:
      soak.prepare()
      end = time.monotonic() + 60 * minutes
      while time.monotonic() < end:
        soak.disturb(soak.random.choice(kinds))
    finally:
      verdicts = soak.close()
  return int(bool(verdicts["silent"] or verdicts["stuck"]))


if __name__ == "__main__":
  enter_namespace()
  os.environ.update(ENVIRONMENT)
  sys.exit(main(*map(float, sys.argv[1:2]), *map(int, sys.argv[2:3])))
