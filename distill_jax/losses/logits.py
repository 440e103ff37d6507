"""Losses on logits: student [..., C] and teacher [..., C] give one value per example or token, [...].

In the formulas p = softmax(teacher / T), q = softmax(student / T). A class is missing where `class_mask` is
False or where both logits are -inf; a logit of -inf on one side is probability 0. Losses that also take the
label are in labels.py.
"""

import jax
import jax.numpy as jnp

from distill_jax.losses import _checks, _softmax


def kl_divergence(student, teacher, *, temperature=1.0, axis=-1, class_mask=None) -> jax.Array:
  """T^2 KL(p || q), the distillation loss.

  Many programs leave the factor T^2 out (then the gradient shrinks as 1/T^2) or average over the classes as
  well as over the batch (then the loss is C times too weak).

  Args:
    student: logits [..., C], any float dtype; computed in float32 or wider.
    teacher: logits of the same shape; -inf is probability 0.
    temperature: T > 0, may be traced. The factor T^2 keeps the gradient's size independent of T.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits (a padded vocabulary).

  Returns:
    Nats per example, [...], unreduced: `reduce.mean` applies example masks. inf where the student gives
    probability 0 to what the teacher believes possible.

  Raises:
    ValueError: shapes differ, or temperature <= 0.

  Compares: class probabilities
  Shapes: [..., C] -> [...]
  Use: the default for classification, segmentation (per pixel) and language models
  Weight: 0.9 at T = 4, beside 0.1 x cross entropy
  Source: Hinton et al. 2015, section 2.1, arXiv:1503.02531

  >>> kl_divergence(jnp.array([1., 2.]), jnp.array([1., 2.]))
  Array(0., dtype=float32)
  """
  log_q, log_p, t = _softmax.log_pair(student, teacher, temperature, axis, class_mask)
  return t**2 * _softmax.divergence(log_p, log_q)


def reverse_kl(student, teacher, *, temperature=1.0, axis=-1, class_mask=None) -> jax.Array:
  """T^2 KL(q || p): the student avoids what the teacher holds unlikely, and may cover one mode only.

  MiniLLM takes it over sequences that the student samples; per token it is this function.

  Args:
    student: logits [..., C].
    teacher: logits of the same shape.
    temperature: T > 0, may be traced.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per example, [...]. inf where the teacher gives probability 0 to what the student believes possible.

  Raises:
    ValueError: shapes differ, or temperature <= 0.

  Compares: class probabilities, mode seeking
  Shapes: [..., C] -> [...]
  Use: a student too small to cover all of the teacher, mostly language models
  Weight: 1
  Source: MiniLLM, Gu et al. 2024, arXiv:2306.08543

  >>> reverse_kl(jnp.array([1., 2.]), jnp.array([2., 1.])).round(4)
  Array(0.4621, dtype=float32)
  """
  return kl_divergence(teacher, student, temperature=temperature, axis=axis, class_mask=class_mask)


def soft_cross_entropy(student, teacher, *, temperature=1.0, axis=-1, class_mask=None) -> jax.Array:
  """-T^2 sum p log q: `kl_divergence` plus T^2 times the teacher's entropy.

  Its gradient for the student is that of `kl_divergence`; its value at student = teacher is not 0.

  Args:
    student: logits [..., C].
    teacher: logits of the same shape; -inf is probability 0.
    temperature: T > 0, may be traced.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per example, [...].

  Raises:
    ValueError: shapes differ, or temperature <= 0.

  Compares: class probabilities
  Shapes: [..., C] -> [...]
  Use: where a source reports cross entropy; the gradient is kl_divergence's
  Weight: as kl_divergence
  Source: Hinton et al. 2015, section 2, arXiv:1503.02531

  >>> soft_cross_entropy(jnp.array([0., 0.]), jnp.array([0., 0.])).round(4)
  Array(0.6931, dtype=float32)
  """
  log_q, log_p, t = _softmax.log_pair(student, teacher, temperature, axis, class_mask)
  return t**2 * _softmax.cross_entropy(log_p, log_q)


def total_variation(student, teacher, *, temperature=1.0, axis=-1, class_mask=None) -> jax.Array:
  """1/2 sum |p - q|, without the factor T^2.

  Args:
    student: logits [..., C].
    teacher: logits of the same shape.
    temperature: T > 0, may be traced.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    [...], between 0 and 1.

  Raises:
    ValueError: shapes differ, or temperature <= 0.

  Compares: class probabilities, bounded
  Shapes: [..., C] -> [...]
  Use: sequence models where KL is dominated by rare tokens
  Weight: 1
  Source: f-distill, Wen et al. 2023, arXiv:2307.15190

  >>> total_variation(jnp.array([0., 0.]), jnp.array([0., jnp.log(3.)])).round(4)
  Array(0.25, dtype=float32)
  """
  log_q, log_p, _ = _softmax.log_pair(student, teacher, temperature, axis, class_mask)
  return 0.5 * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)).sum(-1)


def logit_mse(student, teacher, *, axis=-1, class_mask=None) -> jax.Array:
  """<(student - teacher)^2>, the mean over the classes that exist.

  Args:
    student: logits [..., C].
    teacher: logits of the same shape.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    [...]. inf where one side alone is -inf; 0 where no class exists.

  Raises:
    ValueError: shapes differ.

  Compares: raw logits, their common offset too
  Shapes: [..., C] -> [...]
  Use: regression to logits; the limit of kl_divergence at a high temperature, with its offset
  Weight: 1
  Source: Ba & Caruana 2014, arXiv:1312.6184

  >>> logit_mse(jnp.array([1., 2.]), jnp.array([1., 4.]))
  Array(2., dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher)
  mask = _checks.mask("class_mask", class_mask, student.shape)
  exists = jnp.maximum(student, teacher) != -jnp.inf
  exists = exists if mask is None else exists & mask
  used = exists & (jnp.minimum(student, teacher) != -jnp.inf)
  error = jnp.where(used, student, 0) - jnp.where(used, teacher, 0)
  squares = jnp.where(exists & ~used, jnp.inf, error**2).sum(axis)
  return squares / jnp.maximum(exists.sum(axis, dtype=squares.dtype), 1)


def hard_distillation(
  student, teacher, *, label_smoothing=0.0, axis=-1, class_mask=None
) -> jax.Array:
  """Cross entropy of the student at argmax(teacher), at T = 1: the teacher's decision as a label.

  Ties go to the first class. The teacher gets no gradient, since argmax has none.

  Args:
    student: logits [..., C].
    teacher: logits of the same shape.
    label_smoothing: e in [0, 1): the label is 1 - e at the argmax plus e spread over all classes.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per example, [...].

  Raises:
    ValueError: shapes differ, or label_smoothing is not in [0, 1).

  Compares: the student with the teacher's decision
  Shapes: [..., C] -> [...]
  Use: vision transformers with a distillation token; needs no temperature
  Weight: 0.5 beside 0.5 x cross entropy
  Source: DeiT, Touvron et al. 2021, arXiv:2012.12877

  >>> hard_distillation(jnp.array([0., 0.]), jnp.array([0., 9.])).round(4)
  Array(0.6931, dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher)
  e = _checks.number(
    "label_smoothing", label_smoothing, student.dtype, low=0, high=1, open_high=True
  )
  mask = _checks.mask("class_mask", class_mask, student.shape)
  log_q = _softmax.log_softmax(student, axis, mask)
  z = jnp.moveaxis(teacher if mask is None else jnp.where(mask, teacher, -jnp.inf), axis, -1)
  exists = (log_q != -jnp.inf) | (z != -jnp.inf)
  label = jnp.where(_first_max(z), 1 - e, 0) + e / jnp.maximum(exists.sum(-1, keepdims=True), 1)
  return _softmax.surprise(jnp.where(exists, label, 0), log_q)


def binary_kl(student, teacher, *, temperature=1.0, axis=-1, class_mask=None) -> jax.Array:
  """T^2 sum_c KL(Bernoulli(sigmoid(t_c / T)) || Bernoulli(sigmoid(s_c / T))).

  Args:
    student: logits [..., C], one yes-or-no question each.
    teacher: logits of the same shape; -inf is a certain no.
    temperature: T > 0, may be traced.
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits.

  Returns:
    Nats per example, [...], summed over the classes.

  Raises:
    ValueError: shapes differ, or temperature <= 0.

  Compares: independent probabilities
  Shapes: [..., C] -> [...]
  Use: multi-label classification and detection heads with sigmoids
  Weight: 1
  Source: multi-label form of Hinton et al. 2015; Yang et al. 2023 (L2D), arXiv:2308.06453

  >>> binary_kl(jnp.array([0.]), jnp.array([jnp.log(3.)])).round(4)
  Array(0.1308, dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher)
  t = _checks.positive("temperature", temperature, student.dtype)
  mask = _checks.mask("class_mask", class_mask, student.shape)
  never_s, never_t = student == -jnp.inf, teacher == -jnp.inf
  exists = ~(never_s & never_t) if mask is None else mask & ~(never_s & never_t)
  s = jnp.where(exists & ~never_s, student / t, 0)
  z = jnp.where(exists & ~never_t, teacher / t, 0)
  # Where the teacher says yes, yes and no change places: with z <= 0 no large terms cancel.
  s, z = (jnp.where(z > 0, -x, x) for x in (s, z))
  odds, surprise = jnp.exp(z), _softplus(s)
  divergence = odds / (1 + odds) * (z - s) + surprise - jnp.log1p(odds)
  terms = jnp.where(never_t, surprise, jnp.where(never_s, jnp.inf, divergence))
  return t**2 * jnp.where(exists, terms, 0).sum(axis)


def standardize(logits, *, axis=-1, class_mask=None) -> jax.Array:
  """(z - mean) / (std + 1e-7) over the classes, std with ddof 1: put in front of any loss of logits.

  The temperature then multiplies the standard deviation of one. A row of equal logits becomes zeros.

  Args:
    logits: [..., C].
    axis: the class axis.
    class_mask: classes that exist, bool, broadcastable to the logits; the others and -inf become -inf.

  Returns:
    Standardized logits, of the same shape.

  Source: Logit standardization in KD, Sun et al. 2024, arXiv:2403.01427

  >>> standardize(jnp.array([1., 2., 3.])).round(4)
  Array([-1.,  0.,  1.], dtype=float32)
  """
  logits = _checks.array("logits", logits, ndim=1)
  exists = logits != -jnp.inf
  mask = _checks.mask("class_mask", class_mask, logits.shape)
  exists = exists if mask is None else exists & mask
  count = exists.sum(axis, keepdims=True)
  z = jnp.where(exists, logits, 0)
  centered = jnp.where(exists, z - z.sum(axis, keepdims=True) / jnp.maximum(count, 1), 0)
  variance = (centered**2).sum(axis, keepdims=True) / jnp.maximum(count - 1, 1)
  return jnp.where(exists, centered / (_checks.root(variance) + 1e-7), -jnp.inf)


def uld(student, teacher) -> jax.Array:
  """sum_i |p_(i) - q_(i)| of the probabilities sorted from large to small, the shorter side padded by 0.

  It needs no common vocabulary, and no token is compared with its own translation: only the shapes of the two
  distributions are. The paper adds cross entropy with weight 1 and this term with weight 1.5.

  Args:
    student: logits [..., C].
    teacher: logits [..., D].

  Returns:
    [...], between 0 and 2.

  Raises:
    ValueError: the axes before the last differ.

  Compares: sorted probabilities, whatever the vocabularies
  Shapes: [..., C], [..., D] -> [...]
  Use: teacher and student with different tokenizers
  Weight: 1.5
  Source: ULD, Boizard et al. 2024, arXiv:2402.12030

  >>> uld(jnp.array([0., 9.]), jnp.array([9., 0., -jnp.inf]))
  Array(0., dtype=float32)
  """
  student, teacher = _checks.pair(student, teacher, ndim=1, leading=jnp.ndim(student) - 1)
  wide = max(student.shape[-1], teacher.shape[-1])
  s, t = (jnp.sort(jnp.exp(_softmax.log_softmax(z)), descending=True) for z in (student, teacher))
  s, t = (jnp.pad(z, [(0, 0)] * (z.ndim - 1) + [(0, wide - z.shape[-1])]) for z in (s, t))
  return jnp.abs(s - t).sum(-1)


def _first_max(x):
  """Bool, True at argmax(x) over the last axis. XLA's own argmax takes ten times as long on CPUs."""
  places = jnp.arange(x.shape[-1])
  first = jnp.where(x < x.max(-1, keepdims=True), x.shape[-1], places).min(-1, keepdims=True)
  return places == first


def _softplus(x):
  """log(1 + e^x); `jax.nn.softplus` also cares for infinite x and takes three times as long."""
  size = jnp.where(x > 0, x, -x)  # not abs, whose derivative at 0 is 0
  return jnp.where(x > 0, x, 0) + jnp.log1p(jnp.exp(-size))
