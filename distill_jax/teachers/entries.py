"""Lets a model read other entries of the batch than its own, such as augmented inputs."""

from collections.abc import Mapping

from distill_jax.models.adapters.kinds import check_model
from distill_jax.types import Batch, Model


def read_entries(model: Model, entries: Mapping[str, str]) -> Model:
  """Returns a model that reads other entries of the batch, where the batch has them.

  For noisy student (Xie et al. 2020): the augmentation writes a view into an entry of its own, as
  `data.audio.spec_augment(into=)` does; the student reads this one, and the teacher the clean one.
  A batch without it, as in evaluation, is read as it is.

  Args:
    model: any Model that runs in the step; a `teachers.host` names its own inputs.
    entries: entry that the model reads -> the entry it gets in its place.

  Raises:
    ValueError: `model` is none, or there are no entries.

  >>> import jax.numpy as jnp
  >>> from distill_jax import models, teachers
  >>> student = models.from_apply(None, lambda w, x: {"logits": x @ w}, variables=jnp.eye(2))
  >>> student = teachers.read_entries(student, {"image": "noisy"})
  >>> batch = {"image": jnp.zeros((1, 2)), "noisy": jnp.ones((1, 2))}
  >>> student.apply(*student.variables, batch, train=False, key=None)[0]["logits"]
  Array([[1., 1.]], dtype=float32)
  """
  check_model("model", model)
  if not entries or isinstance(entries, str):
    raise ValueError(
      f'entries: expected names of entries, such as {{"image": "noisy"}}, got {entries!r}'
    )

  def replaced(batch: Batch) -> Batch:
    return {**batch, **{x: batch[other] for x, other in entries.items() if other in batch}}

  def init(key, batch):
    return model.init(key, replaced(batch))

  def apply(params, state, batch, *, train, key):
    return model.apply(params, state, replaced(batch), train=train, key=key)

  def sample(variables, key, batch):
    assert model.sample is not None
    return model.sample(variables, key, replaced(batch))

  return model._replace(init=init, apply=apply, sample=model.sample and sample)
