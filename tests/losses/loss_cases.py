"""One row per public loss: arguments, a reference, what is true of it. Add a row, get every test."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import logit_references as logit
import map_references as maps
import numpy as np

from distill_jax import losses


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """A loss, how to call it and what is true of it.

  `make(rng)` gives the positional arguments in float64, student and teacher (arrays or trees of them) first.
  """

  name: str
  make: Callable
  reference: Callable
  kwargs: dict = dataclasses.field(default_factory=dict)
  kind: str = "features"  # "logits": softmax losses, which no constant added to a row changes
  relational: bool = False  # one scalar for the batch; takes where= and axis_name=
  least: float | None = 0.0  # its value at student = teacher; None: not the least or not a constant
  positive: bool = True  # never negative
  class_mask: bool = False  # takes class_mask=
  frozen: bool = False  # constants for the teacher by contract, so no derivative to compare
  shared: tuple[int, ...] = ()  # positional arguments that have no batch axis
  label: str = ""  # tells two rows of one loss apart

  @property
  def id(self):
    return f"{self.name}-{self.label}" if self.label else self.name

  def __call__(self, *args, **kwargs):
    """The loss alone, without the state that some return beside it."""
    out = getattr(losses, self.name)(*args, **self.kwargs, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def pair(*shape):
  return lambda rng: tuple(2 * rng.normal(size=(2, *shape)))


def soft(name, label="", least=0.0, positive=True, **kwargs):
  """A softmax loss of [..., C] logits that takes class_mask."""
  reference = getattr(logit, name)
  return Case(
    name,
    pair(4, 5),
    reference,
    kwargs,
    "logits",
    least=least,
    positive=positive,
    class_mask=True,
    label=label,
  )


HELPERS: set[str] = set()  # public, but not losses
CASES = [
  soft("kl_divergence", temperature=3.0),
  soft("soft_cross_entropy", least=None, temperature=3.0),
  Case("hint", pair(4, 3, 2), maps.hint),
  Case("cosine", pair(4, 3, 5), maps.cosine),
]

SOFT = [case for case in CASES if case.kind == "logits"]
MASKABLE = [case for case in CASES if case.class_mask]
RELATIONAL = [case for case in CASES if case.relational]
SEPARABLE = [case for case in CASES if not case.relational]


def arguments(case, seed=0, dtype=np.float32):
  """The case's arguments, the floating ones as `dtype`."""
  return cast(case.make(np.random.default_rng(seed)), dtype)


def cast(tree, dtype):
  return map_floats(lambda x: np.asarray(x).astype(dtype), tree)


def map_floats(f, *trees):
  def leaf(x, *rest):
    return f(x, *rest) if jnp.issubdtype(np.asarray(x).dtype, jnp.floating) else x

  return jax.tree.map(leaf, *trees)
