"""Predicts a teacher's codes: cluster ids of its frames."""

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.errors import check_integer
from distill_jax.objectives.calls import outputs_of
from distill_jax.objectives.frame_counts import LENGTHS, frame_counts, is_valid_frame
from distill_jax.objectives.parts import layer, layer_init
from distill_jax.objectives.sequences import resize_sequence
from distill_jax.objectives.terms import Term
from distill_jax.types import Variables


def codes(
  student: str,
  *,
  num_codes: int,
  output: str = "codes",
  lengths: str = LENGTHS,
  resample: bool = False,
) -> Term:
  """Cross entropy of a learned linear map of the student's frames at the teacher's codes.

      codes("block3", num_codes=500)

  The teacher's output holds its codes, int [B, T, num_codebooks] (`teachers.with_codes`), live or
  from a cache (`cache.Codes`: 1 or 2 bytes a code). The map, one for each codebook, trains with the
  student and is not exported. The mean is over the codebooks, and over the valid frames of the
  global batch.

  Weight 1 next to `ctc` is a start. Sources: HuBERT (Hsu et al. 2021, arXiv:2106.07447), one
  codebook, predicted at masked frames by cosine similarity; MVQ-KD (Guo et al. 2022,
  arXiv:2211.00508), several, by a linear map, as here.

  Args:
    student: name of the student's output [B, S, D].
    num_codes: number of codes of each codebook.
    output: name of the teacher's output.
    lengths: as in `frames`.
    resample: where the frame rates differ, interpolate the student's frames linearly within the
      valid ones to the teacher's number. False: other numbers of frames are refused.

  Raises:
    ValueError: at once, num_codes < 2; in init, outputs that are missing or do not fit; in a step,
      lengths that do not fit. A code >= num_codes makes the loss NaN.

  >>> from distill_jax import objectives
  >>> term = objectives.codes("block3", num_codes=4)
  >>> student = {"block3": jnp.ones((1, 2, 8))}
  >>> teacher = {"codes": jnp.array([[[3], [0]]])}
  >>> params, _ = term.init(jax.random.key(0), student, teacher)
  >>> (values, where), _ = term.apply(params, {}, student, teacher, {}, step=0, key=None)
  >>> params["kernel"].shape, values.shape
  ((8, 4), (1, 2))
  """
  check_integer("num_codes", num_codes, 2)

  def sides(s_outputs, t_outputs):
    s = outputs_of(s_outputs, student, "student")
    ids = outputs_of(t_outputs, output, "teacher")
    if len(ids.shape) != 3 or not jnp.issubdtype(ids.dtype, jnp.integer):
      raise ValueError(
        f"{output}: expected codes, int [rows, frames, codebooks], got {ids.dtype} "
        f"{tuple(ids.shape)}: see teachers.with_codes; one codebook is [..., None]"
      )
    if len(s.shape) != 3 or s.shape[0] != ids.shape[0]:
      raise ValueError(
        f"{student}: expected frames [{ids.shape[0]}, frames, channels] of the student, got "
        f"{tuple(s.shape)}"
      )
    if not resample and s.shape[1] != ids.shape[1]:
      raise ValueError(
        f"{student}: expected the teacher's {ids.shape[1]} frames, got {s.shape[1]} of the "
        "student: write codes(..., resample=True)"
      )
    return s, ids

  def init(key, s_outputs, t_outputs):
    s, ids = sides(s_outputs, t_outputs)
    return Variables(layer_init(key, s.shape[-1], ids.shape[-1] * num_codes), {})

  def apply(params, state, s_outputs, t_outputs, batch, *, step, key, axis_name=None):
    del step, key, axis_name
    s, ids = sides(s_outputs, t_outputs)
    shapes = s.shape[:2], ids.shape[:2]
    counts = frame_counts(lengths, student, (s_outputs, t_outputs), shapes, batch)
    compared = jnp.where(counts.student > 0, counts.teacher, 0)
    if not resample:
      compared = jnp.minimum(counts.student, counts.teacher)
    where = is_valid_frame(compared, ids.shape[1])
    where = where if counts.where is None else where & counts.where[:, None]
    if resample:
      s = resize_sequence(s, counts.student, counts.teacher, ids.shape[1])
    s = jnp.where(where[..., None], s, 0).astype(reduce.common_dtype(s.dtype, jnp.float32))
    values = _cross_entropy(layer(params, s), ids, num_codes)
    values = jnp.where(counts.outside[:, None], jnp.nan, values)
    return (values, where | counts.outside[:, None]), state

  return Term(init, apply)


def _cross_entropy(z: jax.Array, ids: jax.Array, num_codes: int) -> jax.Array:
  """Returns the mean over the codebooks [B, T]; NaN at codes that do not exist."""
  log_q = jax.nn.log_softmax(z.reshape(*ids.shape, num_codes))
  exists = (ids >= 0) & (ids < num_codes)
  index = jnp.where(exists, ids, 0)[..., None].astype(jnp.int32)
  values = -jnp.take_along_axis(log_q, index, -1)[..., 0]
  return jnp.where(exists, values, jnp.nan).mean(-1)
