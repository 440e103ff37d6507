"""Terms that learn a network over maps [B, H, W, C], such as a generator or a fusion of stages."""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.objectives.learned import check_pair, learned
from distill_jax.objectives.parts import (
  align,
  align_init,
  connector,
  connector_init,
  layer,
  layer_init,
  resize_to,
  stack,
  stack_init,
)
from distill_jax.objectives.terms import Term
from distill_jax.types import Tree, Variables


def mgd(student: str, teacher: str, *, mask_fraction: float = 0.65, over: str = "space") -> Term:
  """Masked generative distillation: `losses.mgd` of a generator that sees part of the student.

  The generator is two 3x3 convolutions with a ReLU between. Each step samples the mask again; under
  an axis name every device samples the same one for its rows. Weights: 2e-5 for 65 % of the
  positions (detection, segmentation), 7e-5 for 15 % of the channels (classification) (Yang et al.
  2022, section 4, arXiv:2205.01529).

  Args:
    student, teacher: names of maps [B, H, W, C]; channels and size are aligned as in `features`.
    mask_fraction: fraction in [0, 1) that is masked; 0.65 over space, 0.15 over channels in the
      paper.
    over: 'space' masks positions, 'channels' all positions of a channel.

  Raises:
    ValueError: at once, mask_fraction or over out of range; in init, outputs that are not maps of
      as many rows.
  """
  if over not in ("space", "channels"):
    raise ValueError(f"over: expected 'space' or 'channels', got {over!r}")
  if not 0 <= mask_fraction < 1:
    raise ValueError(f"mask_fraction: expected a number in [0, 1), got {mask_fraction}")

  def init(key, s, t):
    check_pair(s, t, rank=4)
    align_key, generator_key = jax.random.split(key)
    width = t.shape[-1]
    generator = stack_init(generator_key, (width, width, width), window=(3, 3))
    return Variables({"align": align_init(align_key, s, t), "generator": generator}, {})

  def apply(params, state, s, t, *, key):
    s = align(params["align"], s, t)
    shape = (*s.shape[:3], 1) if over == "space" else (s.shape[0], 1, 1, s.shape[3])
    unmasked = jax.random.bernoulli(key, 1 - mask_fraction, shape)
    generated = stack(params["generator"], jnp.where(unmasked, s, 0))
    return losses.mgd(generated, t), state

  return learned(student, teacher, init, apply)


def review_kd(
  student: tuple[str, ...], teacher: tuple[str, ...], *, width: int | None = None
) -> Term:
  """Knowledge review: `losses.review_kd` of fused stages, summed over the stages.

  From the deepest stage up, attention-based fusion (section 3.3) maps each of the student's maps
  to `width` channels (1x1 convolution, batch norm), adds the deeper one's result under two learned
  attention maps (sigmoid of a 1x1 convolution of both), and maps to the teacher's channels (3x3
  convolution, batch norm). Sizes are changed by nearest neighbors. Weight 1 (ImageNet) to 8
  (CIFAR-100), warmed up linearly over 20 epochs (Chen et al. 2021, arXiv:2104.09044):
  `optax.linear_schedule(0.0, 8.0, 20 * steps_per_epoch)`.

  Args:
    student, teacher: as many names of maps [B, H, W, C], from shallow to deep.
    width: number of channels of the fusion; None: those of the student's deepest stage, at most
      512, as in the paper's code.

  Raises:
    ValueError: at once, different numbers of names; in init, outputs that are not maps of as many
      rows.
  """
  is_name = isinstance(student, str) or isinstance(teacher, str)
  if is_name or len(student) != len(teacher) or not student:
    raise ValueError(
      f"student, teacher: expected tuples of as many names, got {student!r} and {teacher!r}"
    )
  deepest = len(student) - 1

  def init(key, s, t):
    size = width or min(512, s[-1].shape[-1])
    params = {}
    for i, (s_map, t_map) in enumerate(zip(s, t)):
      check_pair(s_map, t_map, rank=4)
      narrow, widen, attend = jax.random.split(jax.random.fold_in(key, i), 3)
      params[str(i)] = {
        "narrow": connector_init(narrow, s_map.shape[-1], size),
        "widen": connector_init(widen, 3, 3, size, t_map.shape[-1]),
      }
      if i < deepest:
        params[str(i)]["attend"] = layer_init(attend, 2 * size, 2)
    return Variables(params, {})

  def apply(params, state, s, t, *, where, axis_name):
    rows = {"where": where, "axis_name": axis_name}
    values = []
    deeper = None
    for i in range(deepest, -1, -1):
      x = connector(params[str(i)]["narrow"], s[i], **rows)
      if deeper is not None:
        deeper = resize_to(deeper, x, "nearest")
        gates = jax.nn.sigmoid(layer(params[str(i)]["attend"], jnp.concatenate([x, deeper], -1)))
        x = x * gates[..., :1] + deeper * gates[..., 1:]
      deeper = resize_to(x, t[i], "nearest")
      values.append(losses.review_kd(connector(params[str(i)]["widen"], deeper, **rows), t[i]))
    return jnp.stack(values).sum(0), state

  return learned(student, teacher, init, apply)


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
  """
  if not 0 < rate <= 1:
    raise ValueError(f"rate: expected a number in (0, 1], got {rate}")

  def init(key, s, t):
    del s
    check_pair(t, t, rank=4)
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


def factor_transfer(student: str, teacher: str, paraphraser: Any = None, *, p: float = 1) -> Term:
  """`losses.factor_transfer` of a learned translation of the student and the teacher's factors.

  The translator is three 3x3 convolutions with batch norm and leaky ReLU (slope 0.1). Weight 200
  (Kim et al. 2018, arXiv:1802.04977).

  Args:
    student, teacher: names of maps [B, H, W, C], the last stages'.
    paraphraser: parameters of a trained `paraphraser` of the same teacher's map; they are copied,
      held constant and stored in the term's state. None: the teacher's map itself replaces the
      factors, which is simpler than the paper's method (no unsupervised stage) and is not what its
      results were measured with.
    p: exponent >= 1.

  Raises:
    ValueError: in init, outputs that are not maps of as many rows, a paraphraser of other
      channels, or p < 1.
  """

  def init(key, s, t):
    check_pair(s, t, rank=4)
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

  def apply(params, state, s, t, *, where, axis_name):
    s = resize_to(s, t)
    for i in range(3):
      s = _leaky_relu(connector(params[str(i)], s, where=where, axis_name=axis_name))
    return losses.factor_transfer(s, _target(state["encoder"], t), p=p), state

  return learned(student, teacher, init, apply)


def layer_attention(
  student: tuple[str, ...], teacher: tuple[str, ...], *, width: int = 128
) -> Term:
  """Attention-based feature distillation: `losses.layer_attention` learns to pair the layers.

  Weight 200 (CIFAR-100), 50 in transfer (Ji et al. 2021, arXiv:2102.02973).

  Args:
    student, teacher: names of maps [B, H, W, C] of any number and size.
    width: width of queries and keys.

  Raises:
    ValueError: at once, a name instead of names; in init, outputs that are not maps of as many
      rows.
  """
  if isinstance(student, str) or isinstance(teacher, str):
    raise ValueError(f"student, teacher: expected tuples of names, got {student!r} and {teacher!r}")

  def init(key, s, t):
    s_channels = [x.shape[-1] for x in s]
    t_channels = [x.shape[-1] for x in t]
    return Variables(losses.layer_attention_init(key, s_channels, t_channels, width=width), {})

  def apply(params, state, s, t):
    return losses.layer_attention(s, t, params), state

  return learned(student, teacher, init, apply)


def fgd(
  student: str,
  teacher: str,
  *,
  stride: float,
  boxes: str = "boxes",
  valid: str = "boxes_valid",
  **hyperparameters: Any,
) -> Term:
  """Focal and global distillation: `losses.fgd` with learned context blocks and the batch's boxes.

  Weight 1, for each level of the neck: the weights are the hyper-parameters (Yang et al. 2022,
  arXiv:2111.11837).

  Args:
    student, teacher: names of maps [B, H, W, C] of one level; channels and size are aligned as in
      `features`.
    stride: number of pixels per position of the teacher's map at this level.
    boxes: name of the batch's entry of (x0, y0, x1, y1) in pixels, [B, N, 4].
    valid: name of the batch's entry that marks the boxes that exist, bool [B, N].
    **hyperparameters: `temperature`, `alpha`, `beta`, `gamma`, `relation` of the loss.

  Raises:
    ValueError: at once, stride <= 0; in init, outputs that are not maps of as many rows; in a
      step, boxes that do not fit or that the batch lacks, or a hyper-parameter that the loss
      rejects.
  """
  if not stride > 0:
    raise ValueError(f"stride: expected a number > 0, got {stride}")

  def init(key, s, t):
    check_pair(s, t, rank=4)
    align_key, context_key = jax.random.split(key)
    context = losses.fgd_init(context_key, t.shape[-1])
    return Variables({"align": align_init(align_key, s, t), "context": context}, {})

  def apply(params, state, s, t, *, boxes, valid):
    _, height, width, _ = t.shape
    foreground = losses.box_weights(boxes / stride, valid, height=height, width=width)
    aligned = align(params["align"], s, t)
    return losses.fgd(aligned, t, foreground, params["context"], **hyperparameters), state

  return learned(student, teacher, init, apply, entries={"boxes": boxes, "valid": valid})


def _leaky_relu(x):
  return jax.nn.leaky_relu(x, 0.1)


def _target(encoder, t):
  return factors(encoder, t) if encoder else t
