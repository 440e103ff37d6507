"""Weights among a model's outputs, for terms that compare them."""

from distill_jax.trees import chosen
from distill_jax.types import Model


def with_weights(model: Model, pattern: str = "") -> Model:
  """The model with parameters among its outputs: 'weights', `{path: array}`; they are differentiated as such.

      kernels = r"(query|key|value)/kernel$"
      fit(with_weights(student, kernels), with_weights(teacher, kernels), weighted(same=(1.0, weights())), ...)

  Params and state stay as they are, and so do checkpoints and what is exported.

  Args:
    model: any Model; a teacher that follows the student too.
    pattern: of the parameters' paths, for `re.search`; "" is found in all.

  Raises (in apply):
    ValueError: the pattern fits no parameter, or is no regular expression.
  """

  def apply(params, state, batch, *, train, key):
    outputs, state = model.apply(params, state, batch, train=train, key=key)
    return {**outputs, "weights": chosen(params, pattern)}, state

  return model._replace(apply=apply)
