"""Tests run on 8 virtual CPU devices; `--integration` adds whole jobs, `--slow` the ones that
take minutes, `--nightly` the long forms of others.
"""

import atexit
import importlib.metadata
import os
import shutil
import sys
import tempfile

os.environ["XLA_FLAGS"] = " ".join(
  [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
)
# The tests compile a lot and compute little: without LLVM's slow passes, and with the code
# generator that compiles faster, they take half of the time. `.ci/run` has some of them compiled as
# users do. Not the slow ones: with that generator a teacher within a step rounds otherwise than one
# alone, and runs that must end alike do not.
if "DISTILL_JAX_COMPILED_AS_USERS_DO" not in os.environ:
  # The controller chooses: its workers do not see its arguments.
  has_choice = int(importlib.metadata.version("jaxlib").split(".")[1]) < 12
  codegen = (
    "--xla_cpu_use_fusion_emitters=false"
    if has_choice and not {"--slow", "--nightly"} & {*sys.argv}
    else ""
  )
  os.environ.setdefault("DISTILL_JAX_TEST_CODEGEN", codegen)
  os.environ["XLA_FLAGS"] += (
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # Two workers keep two cores busy: programs split for parallel compilation cost 8 % more.
    " --xla_cpu_parallel_codegen_split_count=1 "
  )
  os.environ["XLA_FLAGS"] += os.environ["DISTILL_JAX_TEST_CODEGEN"]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests compile the same programs, in several workers and the processes that they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="distill_jax_programs_")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import numpy as np
import pytest

if not hasattr(jax, "enable_x64"):  # jax 0.8.0
  from jax.experimental import enable_x64

  jax.enable_x64 = enable_x64

OPT_IN = {"slow": "takes minutes", "integration": "is for CI", "nightly": "repeats a shorter test"}


def pytest_addoption(parser):
  for marker, reason in OPT_IN.items():
    parser.addoption(
      f"--{marker}", action="store_true", help=f"also run tests marked {marker} ({reason})"
    )


def pytest_collection_modifyitems(config, items):
  for marker, reason in OPT_IN.items():
    if config.getoption(f"--{marker}"):
      continue
    for item in items:
      if marker in item.keywords:
        item.add_marker(pytest.mark.skip(reason=f"{reason}: add --{marker}"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Gives a file's tests to one worker: they share traced and compiled programs."""
  from xdist.scheduler import LoadFileScheduling

  return LoadFileScheduling(config, log)


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture(scope="session")
def mesh():
  """All 8 devices along `data`."""
  return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
