"""What no file of this project may do, and how large files and functions may be."""

import ast
import collections
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "distill_jax"
# YAML turns `no` into False, pickles run code when opened, archives write outside their folder.
MODULES = {
  "yaml",
  "ruamel",
  "pickle",
  "cPickle",
  "tarfile",
  "dill",
  "cloudpickle",
  "joblib",
  "marshal",
  "shelve",
}
CALLS = {"eval", "exec", "__import__", "torch.load", "from_bytes", "unpack_archive", "read_pickle"}
# Its Unpickler knows numpy's arrays only, and a test tries others.
RESTRICTED_PICKLE = "configs/watch_activity.py"
ARGUMENTS = {"allow_pickle", "trust_remote_code"}
FOLDERS = {
  "boxes",
  "cache",
  "compression",
  "cost",
  "data",
  "distributed",
  "docs",
  "jobs",
  "losses",
  "models",
  "objectives",
  "report",
  "storage",
  "tasks",
  "teachers",
  "train",
}
MAX_TOP_LEVEL_FILES = 9
MAX_LINES = 300
MAX_LONG_FILES = 3
MAX_BODY_LINES = 60


def sources(*folders):
  return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path):
  return path.relative_to(ROOT).as_posix()


def offences(source):
  """Returns the lines of a module that read formats which run code."""
  lines = []
  for node in ast.walk(ast.parse(source)):
    names = []
    if isinstance(node, ast.Import):
      modules = [alias.name.split(".")[0] for alias in node.names]
      names = [name for name in modules if name in MODULES]
    elif isinstance(node, ast.ImportFrom):
      parts = [(node.module or "").split(".")[0], *(alias.name for alias in node.names)]
      names = [name for name in parts if name in MODULES | CALLS]
    elif isinstance(node, ast.Call):
      called = ast.unparse(node.func)
      is_forbidden = called in CALLS or called.split(".")[-1] in CALLS - {"eval", "exec"}
      # int.from_bytes reads one number, flax.serialization.from_bytes casts shapes and dtypes.
      names = [called] if is_forbidden and called != "int.from_bytes" else []
      for keyword in node.keywords:
        is_off = isinstance(keyword.value, ast.Constant) and not keyword.value.value
        if keyword.arg in ARGUMENTS and not is_off:
          names.append(keyword.arg)
    lines += [f"line {node.lineno}: {name}" for name in names]
  return lines


def imports_mock(source):
  """Returns whether a module imports `unittest.mock`."""
  for node in ast.walk(ast.parse(source)):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    if "unittest.mock" in names:
      return True
  return False


def body_lines(function):
  """Returns the number of lines of a function without its signature and docstring."""
  statements = function.body[1:] if ast.get_docstring(function) is not None else function.body
  return statements[-1].end_lineno - statements[0].lineno + 1 if statements else 0


def long_functions(source):
  """Returns (name, lines of the body) of the functions of a module that are too long."""
  kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
  functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
  lines = [(function.name, body_lines(function)) for function in functions]
  return [(name, count) for name, count in lines if count > MAX_BODY_LINES]


def test_sources_read_no_format_that_runs_code():
  paths = sources("distill_jax", "configs")
  assert len(paths) > 100
  found = {relative(path): offences(path.read_text()) for path in paths}
  text = (ROOT / RESTRICTED_PICKLE).read_text()
  assert set(re.findall(r"pickle\.(\w+)", text)) == {"Unpickler"}
  assert [line.split()[-1] for line in found.pop(RESTRICTED_PICKLE)] == ["pickle"]
  assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
  "source",
  [
    "import yaml",
    "import pickle as p",
    "from tarfile import open",
    "from six.moves import cPickle",
    "def f():\n  import dill",
    "import shelve, os",
    "np.load(f, allow_pickle=True)",
    "np.load(f, allow_pickle=flag)",
    "load(x, trust_remote_code=True)",
    "eval('1')",
    "exec(code)",
    "__import__('x')",
    "builtins.__import__('x')",
    "torch.load(f)",
    "from torch import load\nflax.serialization.from_bytes(t, b)",
    "from flax.serialization import from_bytes",
    "shutil.unpack_archive(f)",
  ],
)
def test_offence_is_reported(source):
  assert len(offences(source)) == 1


@pytest.mark.parametrize(
  "source",
  [
    "model.eval()",
    "int.from_bytes(b, 'little')",
    "np.load(f, allow_pickle=False)",
    "re.compile('x')",
  ],
)
def test_safe_source_is_not_reported(source):
  assert offences(source) == []


def test_no_text_names_a_path_of_one_machine():
  home = re.compile(r"(?<![\w.])/(root|home|Users|work|opt)/\w")
  suffixes = {".py", ".md", ".toml", ".ipynb", ".cfg", ".txt", ".json", ""}
  folders = [ROOT / name for name in ("distill_jax", "configs", "tests", "colabs", ".ci")]
  top = [path for path in ROOT.glob("*") if path.name != ".git"]  # A file in a worktree.
  files = [path for folder in folders for path in folder.rglob("*")] + top
  texts = [
    path
    for path in files
    if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts
  ]
  assert [relative(path) for path in texts if home.search(path.read_text())] == []


def test_structure_of_the_package():
  """DESIGN's tree, files near 200 lines, functions near 20."""
  # A folder that moved may still hold compiled files.
  files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file()]
  folders = {path.parts[0] for path in files if len(path.parts) > 1 and path.suffix != ".pyc"}
  top_level = sorted(path.name for path in PACKAGE.glob("*.py"))
  texts = {relative(path): path.read_text() for path in sources("distill_jax")}
  long_files = {path: n for path, text in texts.items() if (n := text.count("\n")) > MAX_LINES}
  long_bodies = {path: names for path, text in texts.items() if (names := long_functions(text))}
  mocks = [path for path, text in texts.items() if imports_mock(text)]
  problems = {
    "missing folders": FOLDERS - folders,
    "unknown folders": folders - FOLDERS,
    f"more than {MAX_TOP_LEVEL_FILES} files at the top level": (
      top_level if len(top_level) > MAX_TOP_LEVEL_FILES else ()
    ),
    f"more than {MAX_LONG_FILES} files above {MAX_LINES} lines": (
      long_files if len(long_files) > MAX_LONG_FILES else ()
    ),
    f"function bodies above {MAX_BODY_LINES} lines": long_bodies,
    "imports of unittest.mock": mocks,
  }
  assert {problem: found for problem, found in problems.items() if found} == {}


def test_wheel_has_all_packages_and_the_configs():
  listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
  folders = {path.parent for path in PACKAGE.rglob("__init__.py")}
  names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
  assert listed == sorted(names | {"distill_jax.configs"})


def test_no_two_files_of_tests_share_a_name():
  """pytest imports them by their names alone: a second one fails, where both are run."""
  counts = collections.Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
  assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize(
  ("source", "lines"),
  [
    ("def f(\n  a,\n):\n  'One.\n  '\n  return a".replace("'", '"""'), 1),
    ("def f(a):\n  b = a\n\n  # why\n  return b", 4),
    ('def f():\n  """Only a docstring."""', 0),
    ("async def f():\n  def g():\n    return 1\n  return g", 3),
  ],
)
def test_body_lines_exclude_signature_and_docstring(source, lines):
  assert body_lines(ast.parse(source).body[0]) == lines


@pytest.mark.parametrize(
  ("source", "expected"),
  [
    ("import unittest.mock", True),
    ("from unittest import mock", True),
    ("from unittest.mock import patch", True),
    ("import unittest", False),
    ("from mock_model import mock", False),
  ],
)
def test_mock_imports_are_reported(source, expected):
  assert imports_mock(source) == expected
