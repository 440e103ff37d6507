"""What no file of this project may do: read formats that run code, or name a path of one machine."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
  path for folder in ("distill_jax", "configs") for path in (ROOT / folder).rglob("*.py")
)
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
ARGUMENTS = {"allow_pickle", "trust_remote_code"}


def offences(source):
  """Lines of a module that do what is forbidden."""
  found = []
  for node in ast.walk(ast.parse(source)):
    names = []
    if isinstance(node, ast.Import):
      names = [
        alias.name.split(".")[0] for alias in node.names if alias.name.split(".")[0] in MODULES
      ]
    elif isinstance(node, ast.ImportFrom):
      parts = [(node.module or "").split(".")[0], *(alias.name for alias in node.names)]
      names = [name for name in parts if name in MODULES | CALLS]
    elif isinstance(node, ast.Call):
      called = ast.unparse(node.func)
      names = (
        [called] if called in CALLS or called.split(".")[-1] in CALLS - {"eval", "exec"} else []
      )
      # int.from_bytes reads one number, flax.serialization.from_bytes casts shapes and dtypes silently.
      names = [] if called == "int.from_bytes" else names
      names += [
        keyword.arg
        for keyword in node.keywords
        if keyword.arg in ARGUMENTS
        and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
      ]
    found += [f"line {node.lineno}: {name}" for name in names]
  return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_read_nothing_that_runs_code(path):
  assert offences(path.read_text()) == []


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
def test_the_lint_sees(source):
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
def test_the_lint_allows(source):
  assert offences(source) == []


def test_no_text_names_a_path_of_one_machine():
  home = re.compile(r"(?<![\w.])/(root|home|Users|work|opt)/\w")
  texts = {".py", ".md", ".toml", ".ipynb", ".cfg", ".txt", ".json", ""}
  folders = [ROOT / name for name in ("distill_jax", "configs", "tests", "colabs", ".ci")]
  files = [path for folder in folders for path in folder.rglob("*")] + list(ROOT.glob("*"))
  for path in files:
    if path.is_file() and path.suffix in texts and "__pycache__" not in path.parts:
      assert not home.search(path.read_text()), path
