"""Imports point down the floors of the package and never in a circle; the losses need jax alone."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

import distill_jax

ROOT = pathlib.Path(distill_jax.__file__).parent
FLOORS = [
  ["types", "reduce", "trees", "errors", "version"],
  ["losses", "distributed"],
  ["storage", "objectives", "data"],
  ["models", "compression", "teachers", "report", "metrics"],
  ["tasks", "cache"],
  ["train"],
  ["cost"],
  ["jobs", "__main__"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
HEAVY = "flax optax orbax grain tensorflow_datasets tensorflow sklearn matplotlib absl ml_collections keras"


def modules(root):
  """{'distill_jax.losses.logits': its file}."""
  names = {}
  for file in sorted(root.rglob("*.py")):
    parts = (root.name, *file.relative_to(root).with_suffix("").parts)
    names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
  return names


def imported(source, module, is_package, known):
  """The modules of the package that `source` imports, each as the deepest one that its name reaches."""
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
      while name and name not in known:
        name = name.rpartition(".")[0]
      if name:
        yield name


def faults(root):
  """Every arrow that points up, every module without a floor, and the first circle."""
  known = modules(root)
  package = root.name
  graph = {
    module: set(imported(file.read_text(), module, file.name == "__init__.py", known))
    - {module, package}
    for module, file in known.items()
    if module != package  # its lazy import of `load_student` is the one exception
  }
  found = [f"{m} has no floor: add it to FLOORS" for m in graph if m.split(".")[1] not in FLOOR]
  if found:
    return found
  for module, targets in graph.items():
    for target in sorted(targets):
      if FLOOR[target.split(".")[1]] > FLOOR[module.split(".")[1]]:
        found.append(f"{module} imports {target} from a floor above")
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    found.append("circle: " + " -> ".join(error.args[1]))
  return found


def test_imports_point_down():
  assert faults(ROOT) == []


@pytest.mark.parametrize(
  "files, fault",
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
def test_what_breaks_the_rule_is_found(tmp_path, files, fault):
  for name, text in {"__init__.py": "", **files}.items():
    file = tmp_path / "pkg" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
  assert any(fault in found for found in faults(tmp_path / "pkg"))


def test_losses_import_jax_alone():
  code = (
    "import sys\n"
    f"for name in {HEAVY!r}.split(): sys.modules[name] = None\n"
    "from distill_jax import losses\n"
    "missing = [name for name in losses.__all__ if not hasattr(losses, name)]\n"
    "assert not missing, missing\n"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
