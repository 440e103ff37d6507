"""Losses on feature maps and vectors, channels last: [B, H, W, C] or [B, ..., C].

Where widths must agree and do not, a learned projection of the student comes first
(`objectives.learned`). Losses with a learned student side are in projected.py.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax.losses import _checks
from distill_jax.losses._checks import Scalar


def hint(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """<(s - t)^2>, the mean over all elements of one example.

  The paper writes half the sum; every published implementation takes the mean of all elements.

  Args:
    student: features [B, ...], projected to the teacher's shape.
    teacher: features of the same shape.

  Returns:
    [B].

  Raises:
    ValueError: shapes differ.

  Compares: feature values
  Shapes: [B, ...] -> [B]
  Use: a middle layer of an image network, the student's through a learned projection
  Weight: 100
  Source: FitNets, Romero et al. 2015, equation 3, arXiv:1412.6550

  >>> hint(jnp.array([[1., 2.]]), jnp.array([[1., 4.]]))
  Array([2.], dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher)
  return _checks.per_example((student - teacher) ** 2)


def cosine(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """1 - cos(s, t) over the last axis.

  A row of zeros has no direction: its cosine is 0 and its gradient 0.

  Args:
    student: features [..., C].
    teacher: features of the same shape.

  Returns:
    [...], between 0 and 2.

  Raises:
    ValueError: shapes differ.

  Compares: directions of feature vectors
  Shapes: [..., C] -> [...]
  Use: hidden states of transformers, where scale carries little
  Weight: 1 in addition to the logit loss
  Source: DistilBERT, Sanh et al. 2019, arXiv:1910.01108

  >>> cosine(jnp.array([[1., 0.]]), jnp.array([[0., 2.]]))
  Array([1.], dtype=float32)
  """
  s, t = (_checks.unit(x) for x in _checks.pair(student, teacher))
  # |s - t|^2 / 2 instead of 1 - s't, which loses all digits near 0; norms are 1, or 0 for zeros.
  zeros = sum((x == 0).all(-1).astype(x.dtype) for x in (s, t))
  return 0.5 * (((s - t) ** 2).sum(-1) + zeros)


def attention_transfer(
  student: ArrayLike, teacher: ArrayLike, *, p: Scalar = 2, squared: bool = True
) -> jax.Array:
  """<(Q_s - Q_t)^2> with Q = vec(mean_c |F|^p) over its L2 norm: the network's spatial attention.

  The paper writes the norm of the difference (`squared=False`); its code, and later ones, the mean
  of the squares (`squared=True`), to which the weight 1000 belongs. The attention of a volume
  [B, D, H, W, C] or a clip [B, T, H, W, C] is over all its positions.

  Args:
    student: maps [B, ..., H, W, C].
    teacher: maps [B, ..., H, W, D].
    p: exponent >= 1, may be traced.
    squared: mean of squares, or the L2 norm of the difference.

  Returns:
    [B]. A map of zeros counts as a Q of zeros.

  Raises:
    ValueError: an axis before the last differs (pool the larger map first), or p < 1.

  Compares: spatial attention maps, whatever the channels
  Shapes: [B, ..., H, W, C], [B, ..., H, W, D] -> [B]
  Use: convolutional networks, at the end of each stage
  Weight: 1000
  Source: AT, Zagoruyko & Komodakis 2017, equation 2, arXiv:1612.03928

  >>> attention_transfer(jnp.ones((1, 1, 2, 3)), jnp.array([[[[1.], [0.]]]])).round(4)
  Array([0.2929], dtype=float32)
  """
  student, teacher = _checks.maps(student, teacher)
  p = _checks.number("p", p, student.dtype, low=1)
  s, t = (_checks.unit(_vector((jnp.abs(x) ** p).mean(-1))) for x in (student, teacher))
  return ((s - t) ** 2).mean(-1) if squared else _checks.root(((s - t) ** 2).sum(-1))


def nst(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """Squared MMD with the kernel (a'b)^2 between sets of channels, each a spatial map of norm 1.

  mean_ij (t_i't_j)^2 + mean_ij (s_i's_j)^2 - 2 mean_ij (s_i't_j)^2.

  Args:
    student: maps [B, ..., H, W, C].
    teacher: maps [B, ..., H, W, D].

  Returns:
    [B].

  Raises:
    ValueError: an axis before the last differs (pool the larger map first).

  Compares: distributions of neurons' spatial patterns
  Shapes: [B, ..., H, W, C], [B, ..., H, W, D] -> [B]
  Use: convolutional networks, at the last stage
  Weight: 50
  Source: NST, Huang & Wang 2017, arXiv:1707.01219

  >>> nst(jnp.array([[[[1.], [0.]]]]), jnp.array([[[[0.], [1.]]]]))
  Array([2.], dtype=float32)
  """
  s, t = (_checks.unit(_checks.positions(x), axis=1) for x in _checks.maps(student, teacher))

  if s.shape[1] <= max(s.shape[2], t.shape[2]):
    # sum_ij (a_i'b_j)^2 = <A A', B B'>: few positions make a small Gram matrix, and the MMD one
    # difference.
    s, t = (
      jnp.einsum("bpc,bqc->bpq", x, x, precision=_checks.HIGHEST) / x.shape[2] for x in (s, t)
    )
    return ((s - t) ** 2).sum((1, 2))

  def kernel(a, b):
    gram = jnp.einsum("bpc,bpd->bcd", a, b, precision=_checks.HIGHEST)
    return (gram**2).mean((1, 2))

  return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


def fsp(student: tuple[ArrayLike, ArrayLike], teacher: tuple[ArrayLike, ArrayLike]) -> jax.Array:
  """<(G_s - G_t)^2> with G = F_a' F_b over space / (H W): the flow from layer a to layer b.

  torchdistill sums the L2 norms of the columns of the difference instead of the mean of the
  squares.

  Args:
    student: two maps or sequences, [B, ..., C] and [B, ..., D].
    teacher: two maps or sequences of these channels, of any size.

  Returns:
    [B].

  Raises:
    ValueError: not two maps; the two maps of a network differ in batch or space (pool the larger
      one first); or the networks differ in batch or channels.

  Compares: Gram matrices between two layers
  Shapes: ([B, ..., C], [B, ..., D]) x 2 -> [B]
  Use: residual networks, first and last layer of a stage
  Weight: 50
  Source: FSP, Yim et al. 2017

  >>> a, b = jnp.ones((1, 2, 2, 1)), 3 * jnp.ones((1, 2, 2, 1))
  >>> fsp((a, b), (a, a))
  Array([4.], dtype=float32)
  """
  s, t = _flow("student", student), _flow("teacher", teacher)
  if s.shape != t.shape:
    shapes = [[jnp.shape(x) for x in maps] for maps in (student, teacher)]
    raise ValueError(
      f"student: expected the teacher's batch and channels, got student {shapes[0]} and teacher "
      f"{shapes[1]}"
    )
  s, t = _checks.same_dtype(s, t)
  return _checks.per_example((s - t) ** 2)


def factor_transfer(student: ArrayLike, teacher: ArrayLike, *, p: Scalar = 1) -> jax.Array:
  """mean |f_s - f_t|^p, f the factors flattened over H, W, C and over their L2 norm.

  Factors are the outputs of a learned paraphraser (teacher) and translator (student). For p = 2
  torchdistill takes the L2 norm of the difference instead of the mean of the squares.

  Args:
    student: factors [B, ...].
    teacher: factors of the same shape.
    p: exponent >= 1, may be traced.

  Returns:
    [B].

  Raises:
    ValueError: shapes differ, or p < 1.

  Compares: directions of full maps
  Shapes: [B, ...] -> [B]
  Use: the last stage, through a paraphraser trained before
  Weight: 200
  Source: Factor transfer, Kim et al. 2018, arXiv:1802.04977

  >>> factor_transfer(jnp.array([[1., 0.]]), jnp.array([[0., 2.]]))
  Array([1.], dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher, ndim=2)
  p = _checks.number("p", p, student.dtype, low=1)
  s, t = (_checks.unit(_vector(x)) for x in (student, teacher))
  return (jnp.abs(s - t) ** p).mean(-1)


def inter_channel(student: ArrayLike, teacher: ArrayLike) -> jax.Array:
  """Squared Frobenius norm of G_s - G_t over C; G is the channel Gram matrix with rows of norm 1.

  The Gram matrix F'F is over space; its rows are divided by their L2 norm.

  Published code divides by the batch size once more than a mean over the batch does, hence the
  weight 500 / B.

  Args:
    student: maps [B, ..., H, W, C], through a learned linear layer to the teacher's channels.
    teacher: maps [B, ..., J, K, C], any size.

  Returns:
    [B].

  Raises:
    ValueError: batch or channels differ.

  Compares: correlations between channels
  Shapes: [B, ..., H, W, C], [B, ..., J, K, C] -> [B]
  Use: image networks whose maps differ in size
  Weight: 500 / B
  Source: ICKD, Liu et al. 2021, "Exploring inter-channel correlation" (ICCV)

  >>> inter_channel(jnp.ones((1, 1, 1, 2)), jnp.array([[[[1., 0.], [0., 1.]]]])).round(4)
  Array([0.5858], dtype=float32)
  """
  student = _checks.array("student", student, ndim=4)
  teacher = _checks.array("teacher", teacher, ndim=4)

  def gram(x):
    x = _checks.positions(x)
    return _checks.unit(jnp.einsum("bpc,bpd->bcd", x, x, precision=_checks.HIGHEST))

  if (student.shape[0], student.shape[-1]) != (teacher.shape[0], teacher.shape[-1]):
    raise ValueError(
      f"student: expected the teacher's batch and channels, got student {student.shape} and "
      f"teacher {teacher.shape}"
    )
  student, teacher = _checks.same_dtype(student, teacher)
  return ((gram(student) - gram(teacher)) ** 2).sum((1, 2)) / student.shape[-1]


def _vector(x: jax.Array) -> jax.Array:
  return x.reshape(x.shape[0], -1)


def _flow(name: str, maps: tuple[ArrayLike, ArrayLike]) -> jax.Array:
  """Returns the Gram matrix [B, C, D] between two maps, the mean over positions."""
  if not isinstance(maps, tuple | list) or len(maps) != 2:
    raise ValueError(
      f"{name}: expected two maps (first layer, last layer), got {type(maps).__name__}"
    )
  a, b = (_checks.array(name, x, ndim=3) for x in maps)
  if a.shape[:-1] != b.shape[:-1]:
    raise ValueError(
      f"{name}: expected two maps of one batch and size, got {a.shape} and {b.shape}: pool the "
      "larger one"
    )
  a, b = (_checks.positions(x) for x in (a, b))
  return jnp.einsum("bpc,bpd->bcd", a, b, precision=_checks.HIGHEST) / a.shape[1]
