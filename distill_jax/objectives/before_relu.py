"""Terms over maps before the ReLU that ends a stage, through a 1x1 convolution and batch norm."""

import jax

from distill_jax import losses
from distill_jax.errors import suggest
from distill_jax.objectives.hyperparameters import Number, at_step, check_number
from distill_jax.objectives.learned import check_pair, learned
from distill_jax.objectives.parts import connector, connector_init, resize_to
from distill_jax.objectives.terms import Term
from distill_jax.types import Tree, Variables


def ofd(student: str, teacher: str, margin: jax.Array) -> Term:
  """Overhaul of feature distillation: `losses.ofd` through a 1x1 convolution and batch norm.

  Weight 1e-3 at the last stage, halved for each earlier one (Heo et al. 2019, arXiv:1904.01866).

  Args:
    student, teacher: names of maps before the ReLU that ends a stage, [B, ..., C].
    margin: negative margins [C] of the teacher's channels: `losses.ofd_margin(scale, bias)` of the
      batch norm that gives the teacher's map; `ofd_margin_at` reads it from the teacher's
      parameters.

  Raises:
    ValueError: in init, ranks, rows or lengths differ, or margin is not [C].

  >>> from distill_jax import objectives
  >>> term = objectives.ofd("map", "map", margin=np.full(8, -0.8))
  >>> student, teacher = {"map": np.zeros((2, 4, 4, 4))}, {"map": np.zeros((2, 4, 4, 8))}
  >>> params, _ = jax.eval_shape(term.init, jax.random.key(0), student, teacher)
  >>> jax.tree.map(jnp.shape, params)
  {'layer': {'kernel': (4, 8)}, 'norm': {'bias': (8,), 'scale': (8,)}}
  """

  def apply(params, state, s, t, *, where, axis_name):
    mapped = connector(params, resize_to(s, t), where=where, axis_name=axis_name)
    return losses.ofd(mapped, t, margin), state

  return learned(student, teacher, _connector_init, apply)


def ofd_margin_at(params: Tree, path: str) -> jax.Array:
  """Returns `losses.ofd_margin` of the batch norm at a path of the teacher's parameters.

  Args:
    params: tree of parameters, such as `teacher.variables.params`.
    path: keys from the root, joined by '/': 'blocks/2/norm', with the leaves 'scale' and 'bias'
      under it.

  Raises:
    ValueError: there is no batch norm at the path; the message names the nearest one.

  >>> from distill_jax import objectives
  >>> params = {"stage3": {"norm": {"scale": jnp.ones(2), "bias": jnp.zeros(2)}}}
  >>> margin = objectives.ofd_margin_at(params, "stage3/norm")
  >>> f"{margin[0]:.3f}"  # the mean of the values below 0 of a standard normal distribution
  '-0.798'
  """
  leaves = {
    jax.tree_util.keystr(keys, simple=True, separator="/"): x
    for keys, x in jax.tree_util.tree_leaves_with_path(params)
  }
  norms = [name.removesuffix("/scale") for name in leaves if name.endswith("/scale")]
  if f"{path}/scale" not in leaves or f"{path}/bias" not in leaves:
    raise ValueError(
      f"path: expected a batch norm with scale and bias, got {path!r}{suggest(path, norms)}"
    )
  return losses.ofd_margin(leaves[f"{path}/scale"], leaves[f"{path}/bias"])


def activation_boundary(student: str, teacher: str, *, margin: Number = 1.0) -> Term:
  """`losses.activation_boundary` through a 1x1 convolution and batch norm, the paper's connector.

  Weight 1/1000, without other terms, before the main training (Heo et al. 2019,
  arXiv:1811.03233): a schedule that falls to 0 and `labels` under one that starts at 0 do both in
  one run.

  Args:
    student, teacher: names of maps before the ReLU, [B, ..., C].
    margin: number >= 0, or a schedule of the step.

  Raises:
    ValueError: at once, margin < 0; in init, ranks, rows or lengths differ.

  >>> from distill_jax import objectives
  >>> term = objectives.activation_boundary("map", "map")
  >>> student, teacher = {"map": np.zeros((2, 4, 4, 4))}, {"map": np.zeros((2, 4, 4, 8))}
  >>> params, _ = jax.eval_shape(term.init, jax.random.key(0), student, teacher)
  >>> sorted(params)  # a 1x1 convolution and batch norm
  ['layer', 'norm']
  """

  def check():
    check_number("margin", margin, low=0)

  check()

  def apply(params, state, s, t, *, where, step, axis_name):
    mapped = connector(params, resize_to(s, t), where=where, axis_name=axis_name)
    return losses.activation_boundary(mapped, t, margin=at_step(margin, step)), state

  return learned(student, teacher, _connector_init, apply)


def _connector_init(key, s, t):
  check_pair(s, t)
  return Variables(connector_init(key, s.shape[-1], t.shape[-1]), {})
