"""One row per loss that is compared with PyTorch: its inputs, tiny ones and ones of a size in use.

Imports NumPy alone, so that make_golden.py can run where there is no JAX.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
  """A loss and its inputs, the student's first.

  Attributes:
    name: of the loss in `distill_jax.losses`.
    make: `(Draw) -> arguments`.
    kwargs: its hyper-parameters.
    images: arrays with four axes are images: PyTorch keeps their channels second.
    label: tells two rows of one loss apart.
    peer: whose loss it is compared with: "torchdistill", or "torch" where that has none and it is written here.
  """

  name: str
  make: Callable[["Draw"], tuple]
  kwargs: dict[str, Any] = {}
  images: bool = False
  label: str = ""
  peer: str = "torch"

  @property
  def id(self) -> str:
    return f"{self.name}-{self.label}" if self.label else self.name


class Draw:
  """Makes arrays: tiny ones from sines in float64, or random ones of a real size in float32."""

  def __init__(self, real: bool):
    self.real, self.rng, self.phase = real, np.random.default_rng(0), -1

  def size(self, tiny, real):
    return real if self.real else tiny

  def floats(self, *shape: int) -> np.ndarray:
    if self.real:
      return self.rng.normal(size=shape).astype(np.float32)
    self.phase += 1
    return wave(shape, self.phase)

  def pair(self, tiny, real) -> tuple[np.ndarray, np.ndarray]:
    shape = self.size(tiny, real)
    return self.floats(*shape), self.floats(*shape)

  def integers(self, high: int, *shape: int) -> np.ndarray:
    """In [0, high), as PyTorch wants them."""
    if self.real:
      return self.rng.integers(0, high, shape)
    return (5 * np.arange(np.prod(shape)).reshape(shape) + 1) % high


def wave(shape, phase) -> np.ndarray:
  i = np.arange(1, int(np.prod(shape)) + 1)
  return (2 * np.sin(1.7 * i + phase) + np.cos(0.3 * i * i + phase)).reshape(shape)


def logits(draw):
  return draw.pair((4, 7), (256, 1000))


def labeled(draw):
  student, teacher = logits(draw)
  return student, teacher, draw.integers(student.shape[1], len(student))


def two_vocabularies(draw):
  batch, own, other = draw.size((4, 7, 9), (64, 8000, 10000))
  return draw.floats(batch, own), draw.floats(batch, other)


def kept(draw):
  """A student, and K of V classes of its teacher: indices, log-probabilities and the log of the rest."""
  (batch, classes), k = draw.size(((4, 7), 3), ((128, 16000), 64))
  student, teacher = draw.floats(batch, classes), 2 * draw.floats(batch, classes)
  log_p = teacher - np.log(np.exp(teacher).sum(-1, keepdims=True))
  indices = np.argsort(-log_p, -1)[:, :k]
  log_probs = np.take_along_axis(log_p, indices, -1)
  return student, indices, log_probs, np.log1p(-np.exp(log_probs).sum(-1))


def drawn(draw):
  student, indices, log_probs, log_tail = kept(draw)
  evenly = np.full_like(log_probs, -np.log(indices.shape[1]))
  return student, indices, evenly, np.full_like(log_tail, -np.inf)


def maps(draw):
  return draw.pair((3, 4, 4, 5), (64, 8, 8, 256))


def few_positions(draw):
  return draw.pair((3, 2, 2, 5), (64, 8, 8, 256))


def large_maps(draw):
  return draw.pair((3, 4, 4, 5), (16, 32, 32, 64))


def segmentation(draw):
  return draw.pair((2, 3, 4, 5), (4, 64, 64, 19))


def rows(draw):
  return draw.pair((5, 6), (256, 512))


def triplets(draw):
  return draw.pair((5, 6), (128, 512))


def tokens(draw):
  return draw.pair((2, 3, 6), (16, 128, 768))


def two_layers(draw):
  shape = draw.size((3, 4, 4), (64, 16, 16))
  narrow, wide = draw.size((5, 2), (64, 128))
  return tuple((draw.floats(*shape, narrow), draw.floats(*shape, wide)) for _ in range(2))


def margins(draw):
  student, teacher = maps(draw)
  return student, teacher, -np.abs(draw.floats(student.shape[-1]))


def variances(draw):
  student, teacher = maps(draw)
  return student, teacher, draw.floats(student.shape[-1])


def queue(draw):
  student, teacher = draw.pair((4, 6), (256, 128))
  return student, teacher, draw.floats(draw.size(5, 16384), student.shape[1])


def memory(draw):
  """Embeddings of norm 1, their indices, those of the negatives, and the memory of all examples."""
  batch, width, examples, negatives = draw.size((3, 4, 9, 6), (64, 128, 50_000, 4096))
  student, teacher, *memories = (
    unit(draw.floats(n, width)) for n in (batch, batch, examples, examples)
  )
  constants = np.array([50.0, 70.0], student.dtype) * draw.size(1, 1000)
  indices = np.arange(batch) * draw.size(2, 700)
  return (
    student,
    teacher,
    indices,
    draw.integers(examples, batch, negatives),
    (*memories, constants),
  )


def views(draw):
  batch, width = draw.size((3, 5), (32, 8192))
  student, teacher = draw.floats(draw.size(3, 10), batch, width), draw.floats(2, batch, width)
  return student, teacher, draw.floats(width)


def scores(draw):
  return draw.pair((2, 2, 3, 3), (16, 12, 128, 128))


def relations(draw):
  """Queries, keys and values of both."""
  batch, length, narrow, wide = draw.size((2, 3, 4, 6), (8, 128, 384, 768))
  return tuple(
    tuple(draw.floats(batch, length, width) for _ in range(3)) for width in (narrow, wide)
  )


def layers(draw):
  """Maps of two layers each, and the learned part: queries, keys, bilinear form, positions."""
  student = [(2, 4, 4, 3), (2, 2, 2, 5)] if not draw.real else [(64, 32, 32, 32), (64, 16, 16, 64)]
  teacher = [(2, 2, 2, 6), (2, 1, 1, 4)] if not draw.real else [(64, 16, 16, 128), (64, 8, 8, 256)]
  width = draw.size(3, 128)
  own, other = (tuple(draw.floats(*shape) for shape in shapes) for shapes in (student, teacher))
  queries, keys = (tuple(draw.floats(x.shape[-1], width) for x in maps) for maps in (other, own))
  positions = draw.floats(2, width), draw.floats(2, width)
  return own, other, (queries, keys, draw.floats(2, width, width), *positions)


def kernels(draw):
  shape = draw.size((2, 3), (768, 768))
  return tuple({name: draw.floats(*shape) for name in "abcd"} for _ in range(2))


def lattice(draw):
  batch, frames, nodes, classes = draw.size((2, 3, 3, 5), (4, 100, 25, 512))
  labels = 1 + draw.integers(classes - 1, batch, nodes - 1)
  return *(draw.floats(batch, frames, nodes, classes) for _ in range(2)), labels


def edges(draw):
  return draw.pair((2, 3, 4, 5), (8, 1000, 4, 17))


def boxes(draw):
  """Maps, the foreground's weights, and both context blocks."""
  student, teacher = draw.pair((2, 3, 4, 6), (4, 32, 32, 256))
  foreground = np.maximum(draw.floats(*student.shape[:3]), 0)
  width, half = student.shape[-1], student.shape[-1] // 2
  shapes = [((width,), ()), ((width, half), (half,)), ((half,), (half,)), ((half, width), (width,))]
  blocks = [tuple(tuple(draw.floats(*s) / 4 for s in pair) for pair in shapes) for _ in range(2)]
  return student, teacher, foreground, tuple(blocks)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


TORCHDISTILL = "torchdistill"
CASES = [
  Case("kl_divergence", logits, {"temperature": 4.0}, peer=TORCHDISTILL),
  Case("kl_divergence", segmentation, {"temperature": 1.0}, label="pixels", peer=TORCHDISTILL),
  Case("reverse_kl", logits, {"temperature": 4.0}),
  Case("soft_cross_entropy", logits, {"temperature": 4.0}),
  Case("jensen_shannon", logits, {"teacher_weight": 0.1, "temperature": 4.0}),
  Case("skew_kl", logits, {"alpha": 0.1, "temperature": 4.0}),
  Case("skew_reverse_kl", logits, {"alpha": 0.1, "temperature": 4.0}),
  Case("total_variation", logits, {"temperature": 4.0}),
  Case("logit_mse", logits),
  Case("hard_distillation", logits, {"label_smoothing": 0.1}),
  Case("binary_kl", logits, {"temperature": 4.0}),
  Case("standardize", logits, {"temperature": 4.0}, peer=TORCHDISTILL),
  Case("uld", two_vocabularies),
  Case("dkd", labeled, {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}),
  Case("nkd", labeled, {"gamma": 1.5, "temperature": 2.0}),
  Case("wsld", labeled, {"temperature": 2.0}),
  Case("ofa", labeled, {"eps": 1.5}),
  Case("dist", logits, {"beta": 2.0, "gamma": 1.5, "temperature": 4.0}, peer=TORCHDISTILL),
  Case("class_gram", logits, {"temperature": 4.0}),
  Case("batch_gram", logits, {"temperature": 4.0}),
  Case("sparse_kl", kept),
  Case("sparse_kl_conditional", kept),
  Case("sparse_kl_smoothed", kept),
  Case("sampled_cross_entropy", drawn),
  Case("hint", maps, images=True),
  Case("cosine", tokens),
  Case("attention_transfer", maps, images=True, peer=TORCHDISTILL),
  Case("nst", few_positions, images=True),
  Case("nst", large_maps, images=True, label="large"),
  Case("fsp", two_layers, images=True, peer=TORCHDISTILL),
  Case("factor_transfer", maps, images=True, peer=TORCHDISTILL),
  Case("inter_channel", maps, images=True, peer=TORCHDISTILL),
  Case("activation_boundary", maps, images=True, peer=TORCHDISTILL),
  Case("ofd", margins, images=True),
  Case("review_kd", large_maps, images=True, peer=TORCHDISTILL),
  Case("mgd", maps, images=True),
  Case("vid", variances, images=True, peer=TORCHDISTILL),
  Case("srd", rows, peer=TORCHDISTILL),
  Case("vkd", tokens),
  Case("cwd", segmentation, {"temperature": 4.0}, images=True),
  Case("pearson", large_maps, images=True),
  Case("localization", edges, {"temperature": 10.0}),
  Case("similarity_preserving", maps, images=True),
  Case("rkd_distance", rows, peer=TORCHDISTILL),
  Case("rkd_angle", triplets, peer=TORCHDISTILL),
  Case("pkt", rows, peer=TORCHDISTILL),
  Case("correlation_congruence", rows),
  Case("info_nce", rows, {"temperature": 0.07}),
  Case("queue_similarity", queue, {"student_temperature": 0.2, "teacher_temperature": 0.1}),
  Case("crd", memory, {"temperature": 0.07, "momentum": 0.5}, peer=TORCHDISTILL),
  Case("dino", views, {"student_temperature": 0.1, "teacher_temperature": 0.07, "momentum": 0.9}),
  Case("attention_scores_mse", scores),
  Case("attention_kl", scores),
  Case("minilm_relations", relations, {"relation_heads": 2}),
  Case("layer_attention", layers, images=True),
  Case("weight_alignment", kernels),
  Case("rnnt_three_way", lattice),
  Case("fgd", boxes, {"temperature": 0.5, "relation": 1e-3}, images=True),
]

_DRAW = Draw(real=False)
PUBLISHED = {  # inputs of what published packages define in another way, in test_golden.py
  "logits": _DRAW.pair((4, 7), ()),
  "labels": _DRAW.integers(7, 4),
  "tokens": _DRAW.pair((2, 3, 7), ()),
  "tokens_labels": np.array([[1, 2, -100], [-100, 5, -100]]),
  "rows": _DRAW.pair((5, 6), ()),
  "maps": _DRAW.pair((3, 4, 4, 5), ()),
  "two_layers": tuple((_DRAW.floats(3, 4, 4, 5), _DRAW.floats(3, 4, 4, 1)) for _ in range(2)),
  "memory": memory(_DRAW),
}
