"""Compiles programs for a TPU in a process of its own: `python -m distill_jax.cost.child FOLDER`.

The machine needs no TPU. libtpu reads the environment only once, when it is loaded; it can abort;
and on a TPU's host it would take the chips from the process that uses them.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import AxisType

from distill_jax.cost.chips import topology_options
from distill_jax.cost.compiling import Compiled, Program, compile_on, from_json, to_json
from distill_jax.errors import install_hint

_JOB, _RESULT = "job.json", "result.json"
# No metadata server is asked, no chip is searched for, and two of these processes may run at once.
# The accelerator's type is read and has no effect: the topology is named.
_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
}
# XLA_FLAGS are for this machine's backend; a compilation for absent devices is not cached.
_DROPPED = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")


def compile_for_tpu(
  topology: str, axes: Mapping[str, int], programs: Sequence[Program]
) -> list[Compiled]:
  """Compiles programs one after the other in another process; no TPU is needed.

  Args:
    topology: name of the slice, such as 'v5e:4x4'.
    axes: sizes of the mesh's axes.
    programs: programs lowered for 'tpu' and for this mesh.

  Raises:
    ImportError: libtpu is not installed.
    ValueError: libtpu knows no such slice.
    RuntimeError: the compiler failed for another reason than memory.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ImportError(
      "topology: compiling for a TPU needs libtpu (but no TPU): "
      f"{install_hint('libtpu')}, or use 'cpu'"
    )
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    for index, program in enumerate(programs):
      (folder / f"{index}.program").write_bytes(program.exported)
    job = {
      "topology": topology,
      "axes": dict(axes),
      "programs": [(p.donated, p.products) for p in programs],
    }
    (folder / _JOB).write_text(json.dumps(job))
    child = run_child([sys.executable, "-m", "distill_jax.cost.child", str(folder)])
    if not (folder / _RESULT).exists():
      raise RuntimeError(
        f"compiling for {topology} ended with {child.returncode}: {child.stderr[-2000:].strip()}"
      )
    result = json.loads((folder / _RESULT).read_text())
  if "rejected" in result:
    raise ValueError(
      f"topology: expected a slice that libtpu knows, got {topology!r}: {result['rejected']}"
    )
  return [from_json(values) for values in result["compiled"]]


def run_child(command: Sequence[str]) -> subprocess.CompletedProcess:
  """Runs a command that calls `end_with_parent`; returns its outputs."""
  # The parent's end of the pipe is closed with the parent, also where that is killed.
  reader, writer = os.pipe()
  try:
    return subprocess.run(
      command, env=_environment(), stdin=reader, capture_output=True, text=True, check=False
    )
  finally:
    os.close(reader)
    os.close(writer)


def end_with_parent() -> None:
  """Lets this process end as soon as the one that started it by `run_child` is gone."""

  def wait() -> None:
    os.read(0, 1)
    os._exit(1)

  threading.Thread(target=wait, name="end with parent", daemon=True).start()


def _environment() -> dict[str, str]:
  environment = {name: value for name, value in os.environ.items() if name not in _DROPPED}
  environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
  return environment | _ENVIRONMENT


def _main(folder: Path) -> None:
  job = json.loads((folder / _JOB).read_text())
  try:
    devices = topologies.get_topology_desc(
      job["topology"], "tpu", **topology_options(job["topology"])
    ).devices
  except jax.errors.JaxRuntimeError as error:
    (folder / _RESULT).write_text(json.dumps({"rejected": str(error)}))
    return
  axes = job["axes"]
  mesh = jax.make_mesh(
    tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes), devices=devices
  )
  compiled = []
  for index, (donated, products) in enumerate(job["programs"]):
    program = Program((folder / f"{index}.program").read_bytes(), donated, products)
    compiled.append(to_json(compile_on(program, mesh)))
  (folder / _RESULT).write_text(json.dumps({"compiled": compiled}))


if __name__ == "__main__":
  end_with_parent()
  _main(Path(sys.argv[1]))
