"""Terms that learn a network over maps, such as a generator or a fusion of stages."""

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.errors import check_integer
from distill_jax.objectives.hyperparameters import Number, at_step, check_number
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
from distill_jax.types import Variables


def mgd(student: str, teacher: str, *, mask_fraction: Number = 0.65, over: str = "space") -> Term:
  """Masked generative distillation: `losses.mgd` of a generator that sees part of the student.

  The generator is two 3x3 convolutions (3x3x3 for volumes and clips) with a ReLU between. Each step
  samples the mask again; under an axis name every device samples the same one for its rows.
  Weights: 2e-5 for 65 % of the positions (detection, segmentation), 7e-5 for 15 % of the channels
  (classification) (Yang et al. 2022, section 4, arXiv:2205.01529).

  Args:
    student, teacher: names of maps [B, H, W, C], volumes [B, D, H, W, C] or clips [B, T, H, W, C];
      channels and size are aligned as in `features`.
    mask_fraction: fraction in [0, 1) that is masked, or a schedule of the step; 0.65 over space,
      0.15 over channels in the paper.
    over: 'space' masks positions, 'channels' all positions of a channel.

  Raises:
    ValueError: at once, mask_fraction or over out of range; in init, outputs that are not maps of
      as many rows.

  >>> from distill_jax import objectives
  >>> term = objectives.mgd("map", "map", mask_fraction=0.15, over="channels")
  >>> student, teacher = {"map": np.zeros((2, 4, 4, 4))}, {"map": np.zeros((2, 4, 4, 8))}
  >>> params, _ = jax.eval_shape(term.init, jax.random.key(0), student, teacher)
  >>> params["generator"]["0"]["kernel"].shape
  (3, 3, 8, 8)
  """
  if over not in ("space", "channels"):
    raise ValueError(f"over: expected 'space' or 'channels', got {over!r}")

  def check():
    check_number("mask_fraction", mask_fraction, low=0, high=1, open_high=True)

  check()

  def init(key, s, t):
    check()  # In `fit` also at later steps.
    check_pair(s, t, ranks=(4, 5))
    align_key, generator_key = jax.random.split(key)
    width = t.shape[-1]
    window = (3,) * (len(t.shape) - 2)
    generator = stack_init(generator_key, (width, width, width), window=window)
    return Variables({"align": align_init(align_key, s, t), "generator": generator}, {})

  def apply(params, state, s, t, *, step, key):
    s = align(params["align"], s, t)
    space = s.shape[1:-1] if over == "space" else (1,) * (s.ndim - 2)
    channels = 1 if over == "space" else s.shape[-1]
    shape = (s.shape[0], *space, channels)
    unmasked = jax.random.bernoulli(key, 1 - at_step(mask_fraction, step), shape)
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

  >>> from distill_jax import objectives
  >>> term = objectives.review_kd(("block1", "block2"), ("block1", "block2"))
  >>> student = {"block1": np.zeros((2, 4, 4, 4)), "block2": np.zeros((2, 2, 2, 4))}
  >>> teacher = {"block1": np.zeros((2, 4, 4, 8)), "block2": np.zeros((2, 2, 2, 8))}
  >>> params, _ = jax.eval_shape(term.init, jax.random.key(0), student, teacher)
  >>> {stage: sorted(parts) for stage, parts in params.items()}  # the deepest has none below it
  {'0': ['attend', 'narrow', 'widen'], '1': ['narrow', 'widen']}
  """
  is_name = isinstance(student, str) or isinstance(teacher, str)
  if is_name or len(student) != len(teacher) or not student:
    raise ValueError(
      f"student, teacher: expected tuples of as many names, got {student!r} and {teacher!r}"
    )
  if width is not None:
    check_integer("width", width, 1)
  deepest = len(student) - 1

  def init(key, s, t):
    size = width or min(512, s[-1].shape[-1])
    params = {}
    for i, (s_map, t_map) in enumerate(zip(s, t)):
      check_pair(s_map, t_map, ranks=(4,))
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

  >>> from distill_jax import objectives
  >>> term = objectives.layer_attention(("block1", "block2"), ("map",), width=16)
  >>> student = {"block1": np.zeros((2, 4, 4, 4)), "block2": np.zeros((2, 2, 2, 4))}
  >>> teacher = {"map": np.zeros((2, 4, 4, 8))}
  >>> params, _ = jax.eval_shape(term.init, jax.random.key(0), student, teacher)
  >>> len(params.keys), len(params.queries)  # of the student's and of the teacher's layers
  (2, 1)
  """
  if isinstance(student, str) or isinstance(teacher, str):
    raise ValueError(f"student, teacher: expected tuples of names, got {student!r} and {teacher!r}")
  check_integer("width", width, 1)

  def init(key, s, t):
    s_channels = [x.shape[-1] for x in s]
    t_channels = [x.shape[-1] for x in t]
    return Variables(losses.layer_attention_init(key, s_channels, t_channels, width=width), {})

  def apply(params, state, s, t):
    return losses.layer_attention(s, t, params), state

  return learned(student, teacher, init, apply)
