"""Compiles programs for a TPU on a machine that may have none: `python -m distill_jax.cost.child FOLDER`.

A process of its own, because libtpu reads the environment once, when it is loaded; because it can abort; and because
on a TPU's own host it would take the chips from whoever uses them.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import AxisType

from distill_jax.cost.chips import topology_options
from distill_jax.cost.compiling import Compiled, Program, compile_on, from_plain, plain

_JOB, _RESULT = "job.json", "result.json"
# Nobody is asked for metadata, no chip is looked for, and two of these may run at once. The accelerator's type is
# read and has no effect: the topology comes by name.
_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
}
# XLA_FLAGS are this machine's, for its own backend, and a compilation for devices that are not there is not cached.
_DROPPED = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")


def compile_for_tpu(
  topology: str, axes: Mapping[str, int], programs: Sequence[Program]
) -> list[Compiled]:
  """Compiles programs one after the other, in another process; no TPU is needed.

  Args:
    topology: such as 'v5e:4x4'.
    axes: of the mesh, with their sizes.
    programs: lowered for 'tpu' and for this mesh.

  Raises:
    ImportError: libtpu is not installed.
    ValueError: libtpu knows no such slice.
    RuntimeError: the compiler failed for another reason than memory.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ImportError(
      "compiling for a TPU needs libtpu, though no TPU: pip install 'distill-jax[tpu]'. Without it there is 'cpu'"
    )
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    for number, program in enumerate(programs):
      (folder / f"{number}.program").write_bytes(program.exported)
    job = {
      "topology": topology,
      "axes": dict(axes),
      "programs": [(p.donated, p.products) for p in programs],
    }
    (folder / _JOB).write_text(json.dumps(job))
    environment = {
      name: value for name, value in os.environ.items() if name not in _DROPPED
    } | _ENVIRONMENT
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "distill_jax.cost.child", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if not (folder / _RESULT).exists():
      raise RuntimeError(
        f"compiling for {topology} ended with {done.returncode}: {done.stderr[-2000:].strip()}"
      )
    result = json.loads((folder / _RESULT).read_text())
  if "refused" in result:
    raise ValueError(f"topology {topology!r}: {result['refused']}")
  return [from_plain(values) for values in result["compiled"]]


def _main(folder: Path) -> None:
  job = json.loads((folder / _JOB).read_text())
  try:
    devices = topologies.get_topology_desc(
      job["topology"], "tpu", **topology_options(job["topology"])
    ).devices
  except jax.errors.JaxRuntimeError as error:
    (folder / _RESULT).write_text(json.dumps({"refused": str(error)}))
    return
  axes = job["axes"]
  mesh = jax.make_mesh(
    tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes), devices=devices
  )
  compiled = []
  for number, (donated, products) in enumerate(job["programs"]):
    program = Program((folder / f"{number}.program").read_bytes(), donated, products)
    compiled.append(plain(compile_on(program, mesh)))
  (folder / _RESULT).write_text(json.dumps({"compiled": compiled}))


if __name__ == "__main__":
  _main(Path(sys.argv[1]))
