"""Writes README.md, the table of all losses, from their docstrings.

python -m distill_jax.losses
"""

import importlib
import inspect
import pathlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

from distill_jax import losses

README = pathlib.Path(__file__).with_name("README.md")
FIELDS = ("Compares", "Shapes", "Use", "Weight", "Source")
MODULES = {
  "logits": "Logits",
  "raw_logits": "Logits, without the teacher's softmax",
  "mixtures": "Logits, against a mixture or in both directions",
  "labels": "Logits and labels",
  "token_labels": "Logits and tokens",
  "batch_logits": "Logits, relating the rows of a batch",
  "self_distillation": "Logits and labels, without a teacher",
  "sparse": "Teachers stored as K of V classes",
  "targets": "Targets of K of V classes",
  "linear": "Hidden states and heads, without logits",
  "features": "Features",
  "pointwise": "Features, value by value",
  "positions": "Features, relating the positions of a map",
  "regions": "Features, relating the pixels of each class",
  "preactivations": "Features before the ReLU",
  "projected": "Features with a learned student side",
  "relations": "Features, relating the rows of a batch",
  "neighbors": "Features, relating each row to its neighbors",
  "contrastive": "Contrastive",
  "memory": "Contrastive, with a memory of all examples",
  "cross_image": "Contrastive, with a memory of classes",
  "attention": "Transformers",
  "layers": "Matched layers",
  "singular": "Directions of maps, from layer to layer",
  "sequence": "Sequences",
  "ctc": "Frames of CTC networks",
  "dense": "Dense prediction",
  "grids": "Maps of logits on other grids",
  "focal": "Detection",
}
COLUMNS = ("loss", "what it compares", "shapes", "when to use it", "weight", "source")
HEAD = """# Losses

Written by `python -m distill_jax.losses` from the docstrings; a test fails when it is stale.

`f(student, teacher, ..., *, hyperparameters)`: logits, never probabilities; channels last. A loss
returns one value per example or token, for `distill_jax.reduce.mean(values, where)`; a loss that
returns a scalar relates the rows of a batch and takes `where=` and `axis_name=` (`weight_alignment`
relates weights; the `linear_` losses take `weights=` of the tokens). `reduce.blank` sets masked
rows to 0 first: a NaN there would reach the gradient through any mean. "Weight" is the source's,
next to a mean over the batch and the cross entropy with the labels.

```python
from distill_jax import losses, reduce

student, teacher = reduce.blank(where, student_logits, teacher_logits)
loss = reduce.mean(losses.kl_divergence(student, teacher, temperature=4.0), where)
```
"""


def table() -> str:
  """Returns the page."""
  return "\n".join([HEAD, *(_section(name, title) for name, title in MODULES.items())])


def fields(f: Callable) -> dict[str, str]:
  """Returns the labeled lines of a docstring; a line indented further continues the one before.

  Raises:
    ValueError: a field of FIELDS is missing.
  """
  doc = inspect.getdoc(f) or ""
  values = {}
  for field in FIELDS:
    match = re.search(rf"^{field}: (.+(?:\n  .+)*)", doc, re.MULTILINE)
    if not match:
      raise ValueError(f"{f.__name__}: expected a line '{field}: ...' in its docstring, got none")
    values[field] = " ".join(match[1].split())
  return values


def _section(name: str, title: str) -> str:
  """Returns one module's losses as a table, and its helpers as a list."""
  module = importlib.import_module(f"distill_jax.losses.{name}")
  functions = [f for f in vars(module).values() if _is_public(f, module)]
  functions.sort(key=lambda f: inspect.getsourcelines(f)[1])
  is_loss = {f: "Compares:" in (f.__doc__ or "") for f in functions}
  rows = "\n".join(_row(f) for f in functions if is_loss[f])
  helpers = "\n".join(f"- `{f.__name__}`: {_summary(f)}" for f in functions if not is_loss[f])
  header = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
  parts = [f"## {title}", header + rows if rows else "", helpers]
  return "\n\n".join(part for part in parts if part) + "\n"


def _is_public(f: Any, module: ModuleType) -> bool:
  return getattr(f, "__name__", None) in losses.__all__ and f.__module__ == module.__name__


def _row(f: Callable) -> str:
  values = (value.replace("|", "\\|") for value in fields(f).values())
  return f"| `{f.__name__}` | " + " | ".join(values) + " |"


def _summary(f: Callable) -> str:
  return " ".join((inspect.getdoc(f) or "").split("\n\n")[0].split()).removesuffix(".")


if __name__ == "__main__":
  README.write_text(table())
