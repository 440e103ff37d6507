"""Write README.md, the table of all losses, from their docstrings: `python -m distill_jax.losses`."""

import importlib
import inspect
import pathlib
import re

from distill_jax import losses

README = pathlib.Path(__file__).with_name("README.md")
FIELDS = ("Compares", "Shapes", "Use", "Weight", "Source")
MODULES = {
  "logits": "Logits",
  "mixtures": "Logits, against a mixture",
  "labels": "Logits and labels",
  "batch_logits": "Logits, relating the rows of a batch",
  "sparse": "Teachers kept as K of V classes",
  "linear": "Hidden states and heads, logits never held",
  "features": "Features",
  "preactivations": "Features before the ReLU",
  "projected": "Features with a learned student side",
  "relations": "Features, relating the rows of a batch",
  "contrastive": "Contrastive",
  "attention": "Transformers",
  "layers": "Matched layers",
  "sequence": "Sequences",
  "dense": "Dense prediction",
  "focal": "Detection",
}
HEAD = """# Losses

Written by `python -m distill_jax.losses` from the docstrings; a test fails when it is stale.

`f(student, teacher, ..., *, hyperparameters)`: logits in, never probabilities; channels last. A loss gives one
value per example or token, to be averaged with `distill_jax.reduce.mean(values, where)`; one that gives a
scalar relates the rows of a batch and takes `where=` and `axis_name=` (`weight_alignment` relates weights; the
`linear_` ones take `weights=` of the tokens).
"Weight" is the one of the source beside a mean over the batch and the cross entropy with the labels.

```python
from distill_jax import losses, reduce

loss = reduce.mean(losses.kl_divergence(student_logits, teacher_logits, temperature=4.0), where)
```
"""


def table() -> str:
  """The whole page."""
  sections = []
  for name, title in MODULES.items():
    module = importlib.import_module(f"distill_jax.losses.{name}")
    own = [f for f in vars(module).values() if _is_public(f, module)]
    own.sort(key=lambda f: inspect.getsourcelines(f)[1])
    rows = [_row(f) for f in own if "Compares:" in (f.__doc__ or "")]
    helpers = [
      f"- `{f.__name__}`: {_summary(f)}" for f in own if "Compares:" not in (f.__doc__ or "")
    ]
    heading = f"## {title}\n\n| loss | what it compares | shapes | when to use it | weight | source |\n|{'---|' * 6}\n"
    sections.append(
      heading + "\n".join(rows) + ("\n\n" + "\n".join(helpers) if helpers else "") + "\n"
    )
  return "\n".join([HEAD, *sections])


def fields(f) -> dict[str, str]:
  """The labeled lines of a docstring; a line that is indented further continues the one before."""
  doc = inspect.getdoc(f) or ""
  found = {}
  for field in FIELDS:
    match = re.search(rf"^{field}: (.+(?:\n  .+)*)", doc, re.MULTILINE)
    if not match:
      raise ValueError(f"the docstring of {f.__name__} has no line '{field}: ...'")
    found[field] = " ".join(match[1].split())
  return found


def _is_public(f, module):
  return getattr(f, "__name__", None) in losses.__all__ and f.__module__ == module.__name__


def _row(f):
  values = (value.replace("|", "\\|") for value in fields(f).values())
  return f"| `{f.__name__}` | " + " | ".join(values) + " |"


def _summary(f):
  return " ".join((inspect.getdoc(f) or "").split("\n\n")[0].split()).removesuffix(".")


if __name__ == "__main__":
  README.write_text(table())
