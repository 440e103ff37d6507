"""Adds weights to a model's outputs, for terms that compare them."""

from distill_jax.trees import select_leaves
from distill_jax.types import Model


def with_weights(model: Model, pattern: str = "") -> Model:
  """Returns the model with the output 'weights', `{path: array}`, which is differentiated as
  parameters are.

      kernels = r"(query|key|value)/kernel$"
      student = with_weights(student, kernels)
      teacher = with_weights(teacher, kernels)
      fit(student, teacher, weighted(same=(1.0, weights())), ...)

  Parameters and state stay as they are, and so do checkpoints and exports.

  Args:
    model: any Model; also a teacher that is an EMA of the student.
    pattern: regular expression for the parameters' paths, for `re.search`; "" selects all.

  Raises (in apply):
    ValueError: the pattern fits no parameter, or is no regular expression.

  >>> import jax.numpy as jnp
  >>> from distill_jax import models
  >>> linear = lambda w, x: x @ w["kernel"]
  >>> model = models.from_apply(None, linear, variables={"kernel": jnp.eye(2)})
  >>> model = models.with_weights(model)
  >>> outputs, _ = model.apply(*model.variables, {"image": jnp.ones((1, 2))}, train=False, key=None)
  >>> sorted(outputs["weights"])
  ['kernel']
  """

  def apply(params, state, batch, *, train, key):
    outputs, state = model.apply(params, state, batch, train=train, key=key)
    return {**outputs, "weights": select_leaves(params, pattern)}, state

  return model._replace(apply=apply)
