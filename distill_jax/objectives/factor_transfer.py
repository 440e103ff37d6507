"""Factor transfer: a paraphraser of the teacher's map, and the student's translation to it."""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.objectives.hyperparameters import Number, at_step, check_number, is_number
from distill_jax.objectives.learned import check_pair, learned
from distill_jax.objectives.parts import connector, connector_init, resize_to, stack, stack_init
from distill_jax.objectives.terms import Term
from distill_jax.types import Tree, Variables


def paraphraser(teacher: str, *, rate: float = 0.5) -> Term:
  """Autoencoder of the teacher's map, the first stage of `factor_transfer`.

  <(decoded - t)^2> per example. The encoder is three 3x3 convolutions to `rate` times the
  channels and the decoder three back, each but the last with a leaky ReLU (slope 0.1), without
  batch norm, as in RepDistiller. It does not touch the student, so it is trained first, by
  `weighted(paraphraser=(1.0, paraphraser("block3")))`, and then passed to
  `factor_transfer("block2", "block3", state.params["objective"]["paraphraser"])`.

  Args:
    teacher: name of a map [B, H, W, C].
    rate: number of factors over the number of channels, k in the paper (0.5 to 0.75 there), in
      (0, 1].

  Raises:
    ValueError: at once, rate out of range; in init, an output that is not a map.

  >>> from distill_jax import objectives
  >>> term = objectives.paraphraser("block3", rate=0.5)
  >>> teacher = {"block3": np.zeros((2, 4, 4, 8))}
  >>> params, _ = jax.eval_shape(term.init, jax.random.key(0), {}, teacher)
  >>> params["encoder"]["2"]["kernel"].shape  # 8 channels become 4 factors
  (3, 3, 4, 4)
  """
  if not is_number(rate) or not 0 < rate <= 1:
    raise ValueError(f"rate: expected a number in (0, 1], got {rate!r}")

  def init(key, s, t):
    del s
    check_pair(t, t, ranks=(4,))
    wide = t.shape[-1]
    narrow = max(1, int(rate * wide))
    encoder_key, decoder_key = jax.random.split(key)
    encoder = stack_init(encoder_key, (wide, wide, narrow, narrow), window=(3, 3))
    decoder = stack_init(decoder_key, (narrow, narrow, wide, wide), window=(3, 3))
    return Variables({"encoder": encoder, "decoder": decoder}, {})

  def apply(params, state, s, t):
    del s
    decoded = stack(params["decoder"], factors(params["encoder"], t), _leaky_relu)
    return losses.hint(decoded, t), state

  return learned((), teacher, init, apply)


def factors(encoder: Tree, t: jax.Array) -> jax.Array:
  """Returns the factors of a teacher's map [B, H, W, C], by a `paraphraser`'s 'encoder'."""
  return _leaky_relu(stack(encoder, t, _leaky_relu))


def factor_transfer(student: str, teacher: str, paraphraser: Any = None, *, p: Number = 1) -> Term:
  """`losses.factor_transfer` of a learned translation of the student and the teacher's factors.

  The translator is three 3x3 convolutions with batch norm and leaky ReLU (slope 0.1). Weight 200
  (Kim et al. 2018, arXiv:1802.04977).

  Args:
    student, teacher: names of maps [B, H, W, C], the last stages'.
    paraphraser: parameters of a trained `paraphraser` of the same teacher's map; they are copied,
      held constant and stored in the term's state. None: the teacher's map itself replaces the
      factors, which is simpler than the paper's method (no unsupervised stage) and is not what its
      results were measured with.
    p: exponent >= 1, or a schedule of the step.

  Raises:
    ValueError: at once, p < 1; in init, outputs that are not maps of as many rows, or a paraphraser
      of other channels.

  >>> from distill_jax import objectives
  >>> term = objectives.factor_transfer("block2", "block3")
  >>> student, teacher = {"block2": np.zeros((2, 4, 4, 4))}, {"block3": np.zeros((2, 4, 4, 8))}
  >>> params, _ = jax.eval_shape(term.init, jax.random.key(0), student, teacher)
  >>> params["2"]["layer"]["kernel"].shape
  (3, 3, 8, 8)
  """

  def check():
    check_number("p", p, low=1)

  check()

  def init(key, s, t):
    check()  # In `fit` also at later steps.
    check_pair(s, t, ranks=(4,))
    encoder = {} if paraphraser is None else jax.tree.map(jnp.copy, paraphraser["encoder"])
    channels = encoder["0"]["kernel"].shape[2] if encoder else t.shape[3]
    if channels != t.shape[3]:
      raise ValueError(
        f"paraphraser: expected one for maps of {t.shape[3]} channels, got one for {channels}"
      )
    width = jax.eval_shape(_target, encoder, t).shape[-1]
    sizes = (s.shape[-1], s.shape[-1], width, width)
    keys = jax.random.split(key, 3)
    translator = {str(i): connector_init(keys[i], 3, 3, *sizes[i : i + 2]) for i in range(3)}
    return Variables(translator, {"encoder": encoder})

  def apply(params, state, s, t, *, where, step, axis_name):
    s = resize_to(s, t)
    for i in range(3):
      s = _leaky_relu(connector(params[str(i)], s, where=where, axis_name=axis_name))
    return losses.factor_transfer(s, _target(state["encoder"], t), p=at_step(p, step)), state

  return learned(student, teacher, init, apply)


def _leaky_relu(x):
  return jax.nn.leaky_relu(x, 0.1)


def _target(encoder, t):
  return factors(encoder, t) if encoder else t
