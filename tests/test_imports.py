"""Imports point down the floors of the package and never in a circle; the losses need only jax."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

import distill_jax

ROOT = pathlib.Path(distill_jax.__file__).parent
FLOORS = [
  ["types", "reduce", "trees", "errors", "compat", "version"],
  ["boxes", "losses", "distributed"],
  ["storage", "objectives", "data"],
  ["models", "compression", "teachers", "report"],
  ["tasks", "cache"],
  ["train"],
  ["cost"],
  ["jobs", "__main__"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
EXTRAS = "flax optax orbax grain tensorflow_datasets sklearn matplotlib keras PIL".split()
NEED_EXTRAS = "cache compression.sizes cost data models report tasks teachers train".split()


def modules(root):
  """Returns the files of all modules by name, such as 'distill_jax.losses.logits'."""
  files = {}
  for file in sorted(root.rglob("*.py")):
    if file.parent == root / "docs":
      continue  # The site's configuration is no module of the package.
    parts = (root.name, *file.relative_to(root).with_suffix("").parts)
    files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
  return files


def imported(source, module, is_package, module_names):
  """Yields the modules of the package that `source` imports, each as deep as its name reaches."""
  package = module.split(".") if is_package else module.split(".")[:-1]
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) - node.level + 1] if node.level else []
      base = ".".join([*base, *([node.module] if node.module else [])])
      names = [f"{base}.{alias.name}" for alias in node.names]
    else:
      continue
    for name in names:
      while name and name not in module_names:
        name = name.rpartition(".")[0]
      if name:
        yield name


def violations(root):
  """Returns the imports that point up, the modules without a floor, and the first circle."""
  files = modules(root)
  package = root.name
  graph = {}
  for module, file in files.items():
    if module != package:
      targets = set(imported(file.read_text(), module, file.name == "__init__.py", files))
      graph[module] = targets - {module, package}
  errors = [f"{m} has no floor: add it to FLOORS" for m in graph if m.split(".")[1] not in FLOOR]
  if errors:
    return errors
  for module, targets in graph.items():
    for target in sorted(targets):
      if FLOOR[target.split(".")[1]] > FLOOR[module.split(".")[1]]:
        errors.append(f"{module} imports {target} from a floor above")
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    errors.append("circle: " + " -> ".join(error.args[1]))
  return errors


def run_python(code):
  return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_imports_point_down():
  assert violations(ROOT) == []


def test_floors_name_existing_modules():
  names = {module.split(".")[1] for module in modules(ROOT) if "." in module}
  assert set(FLOOR) == names


@pytest.mark.parametrize(
  ("files", "error"),
  [
    (
      {"reduce.py": "import pkg.train", "train.py": ""},
      "pkg.reduce imports pkg.train from a floor above",
    ),
    ({"types.py": "def f():\n  from pkg import losses", "losses/__init__.py": ""}, "floor above"),
    (
      {
        "losses/a.py": "from . import b",
        "losses/b.py": "from .a import x",
        "losses/__init__.py": "",
      },
      "circle",
    ),
    ({"surprise.py": ""}, "pkg.surprise has no floor"),
  ],
)
def test_violations_are_found(tmp_path, files, error):
  for name, text in {"__init__.py": "", **files}.items():
    file = tmp_path / "pkg" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
  assert any(error in line for line in violations(tmp_path / "pkg"))


def test_losses_need_only_jax():
  result = run_python(
    "import sys\n"
    f"for name in {EXTRAS}: sys.modules[name] = None\n"
    "import distill_jax\n"
    "assert 'jax' not in sys.modules\n"
    "losses = distill_jax.losses\n"
    "missing = [name for name in losses.__all__ if not hasattr(losses, name)]\n"
    "assert not missing, missing\n"
  )
  assert result.returncode == 0, result.stderr


def test_missing_packages_name_their_extra():
  result = run_python(
    "import importlib, sys\n"
    f"for name in {EXTRAS}: sys.modules[name] = None\n"
    f"for name in {NEED_EXTRAS}:\n"
    "  try: importlib.import_module('distill_jax.' + name)\n"
    "  except ModuleNotFoundError as error: assert '[train]' in str(error), error\n"
    "  else: raise AssertionError(name)\n"
  )
  assert result.returncode == 0, result.stderr


def test_star_import_of_models_needs_no_keras():
  result = run_python(
    "import sys\n"
    "sys.modules['keras'] = None\n"
    "from distill_jax.models import *\n"
    "from distill_jax import models\n"
    "assert from_nnx and {'from_keras', 'to_keras'} <= set(dir(models))\n"
    "try: models.from_keras\n"
    "except ImportError as error: assert '[keras]' in str(error), error\n"
    "else: raise AssertionError\n"
  )
  assert result.returncode == 0, result.stderr


def test_dir_lists_public_names_that_resolve():
  names = set(dir(distill_jax))
  floors = {name for names in FLOORS for name in names}
  private = {"compat", "cost", "errors", "jobs", "trees", "types", "version", "__main__"}
  functions = {"describe_inputs", "export_student", "load_student"}
  assert names == (floors - private) | functions | {"__version__"}
  for name in names:
    getattr(distill_jax, name)
  with pytest.raises(AttributeError, match="lossess"):
    distill_jax.lossess  # noqa: B018
