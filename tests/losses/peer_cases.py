"""The cases of losses that are compared with PyTorch: tiny inputs, and inputs of a size in use.

Imports only NumPy, so that make_golden.py can run where there is no JAX.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
  """A loss and its inputs, the student's first.

  Attributes:
    name: name of the loss in `distill_jax.losses`.
    make: `Inputs -> arguments`.
    kwargs: hyper-parameters.
    images: arrays with four axes are images: PyTorch keeps their channels second.
    label: tells two cases of one loss apart.
    peer: package of the other loss: "torchdistill", or "torch" where that has none and it is
      written here.
  """

  name: str
  make: Callable[["Inputs"], tuple]
  kwargs: dict[str, Any] = {}
  images: bool = False
  label: str = ""
  peer: str = "torch"

  @property
  def id(self) -> str:
    return f"{self.name}-{self.label}" if self.label else self.name


class Inputs:
  """Makes arrays: tiny ones from sines in float64, or random ones of a size in use in float32."""

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
    """Returns int64 in [0, high)."""
    if self.real:
      return self.rng.integers(0, high, shape)
    return (5 * np.arange(np.prod(shape)).reshape(shape) + 1) % high


def wave(shape, phase) -> np.ndarray:
  i = np.arange(1, int(np.prod(shape)) + 1)
  return (2 * np.sin(1.7 * i + phase) + np.cos(0.3 * i * i + phase)).reshape(shape)


def logits(inputs):
  return inputs.pair((4, 7), (256, 1000))


def labeled(inputs):
  student, teacher = logits(inputs)
  return student, teacher, inputs.integers(student.shape[1], len(student))


def two_vocabularies(inputs):
  batch, classes, other = inputs.size((4, 7, 9), (64, 8000, 10000))
  return inputs.floats(batch, classes), inputs.floats(batch, other)


def top_classes(inputs):
  """Returns a student, and its teacher's top classes: indices, log-probabilities, log tail."""
  (batch, classes), k = inputs.size(((4, 7), 3), ((128, 16000), 64))
  student, teacher = inputs.floats(batch, classes), 2 * inputs.floats(batch, classes)
  log_p = teacher - np.log(np.exp(teacher).sum(-1, keepdims=True))
  indices = np.argsort(-log_p, -1)[:, :k]
  log_probs = np.take_along_axis(log_p, indices, -1)
  return student, indices, log_probs, np.log1p(-np.exp(log_probs).sum(-1))


def random_samples(inputs):
  student, indices, log_probs, log_tail = top_classes(inputs)
  evenly = np.full_like(log_probs, -np.log(indices.shape[1]))
  return student, indices, evenly, np.full_like(log_tail, -np.inf)


def maps(inputs):
  return inputs.pair((3, 4, 4, 5), (64, 8, 8, 256))


def few_positions(inputs):
  return inputs.pair((3, 2, 2, 5), (64, 8, 8, 256))


def large_maps(inputs):
  return inputs.pair((3, 4, 4, 5), (16, 32, 32, 64))


def segmentation(inputs):
  return inputs.pair((2, 3, 4, 5), (4, 64, 64, 19))


def rows(inputs):
  return inputs.pair((5, 6), (256, 512))


def triplets(inputs):
  return inputs.pair((5, 6), (128, 512))


def tokens(inputs):
  return inputs.pair((2, 3, 6), (16, 128, 768))


def two_layers(inputs):
  shape = inputs.size((3, 4, 4), (64, 16, 16))
  narrow, wide = inputs.size((5, 2), (64, 128))
  return tuple((inputs.floats(*shape, narrow), inputs.floats(*shape, wide)) for _ in range(2))


def margins(inputs):
  student, teacher = maps(inputs)
  return student, teacher, -np.abs(inputs.floats(student.shape[-1]))


def variances(inputs):
  student, teacher = maps(inputs)
  return student, teacher, inputs.floats(student.shape[-1])


def uncertain(inputs):
  student, teacher = rows(inputs)
  return student, teacher, inputs.floats(len(student))


def labeled_pixels(inputs):
  student, teacher = segmentation(inputs)
  return student, teacher, inputs.integers(3, *student.shape[:3])


def vit_tokens(inputs):
  """Returns two shallow layers and the last one of both, and the masked tokens."""
  batch, length, width = inputs.size((2, 4, 3), (64, 196, 384))
  student, teacher = (
    (inputs.floats(batch, 2, length, width), inputs.floats(batch, length, width)) for _ in range(2)
  )
  return student, teacher, inputs.integers(4, batch, length) < 2


def adjacent_maps(inputs):
  """Returns two layers each."""
  shapes = inputs.size([(2, 3, 3, 6), (2, 2, 3, 5)], [(64, 16, 16, 64), (64, 8, 8, 128)])
  return tuple(tuple(inputs.floats(*shape) for shape in shapes) for _ in range(2))


def queue(inputs):
  student, teacher = inputs.pair((4, 6), (256, 128))
  return student, teacher, inputs.floats(inputs.size(5, 16384), student.shape[1])


def memory(inputs):
  """Returns unit embeddings, their indices, those of the negatives, and the memory."""
  batch, width, examples, negatives = inputs.size((3, 4, 9, 6), (64, 128, 50_000, 4096))
  student, teacher, *memories = (
    unit(inputs.floats(n, width)) for n in (batch, batch, examples, examples)
  )
  constants = np.array([50.0, 70.0], student.dtype) * inputs.size(1, 1000)
  indices = np.arange(batch) * inputs.size(2, 700)
  return (
    student,
    teacher,
    indices,
    inputs.integers(examples, batch, negatives),
    (*memories, constants),
  )


def views(inputs):
  batch, width = inputs.size((3, 5), (32, 8192))
  student, teacher = inputs.floats(inputs.size(3, 10), batch, width), inputs.floats(2, batch, width)
  return student, teacher, inputs.floats(width)


def scores(inputs):
  return inputs.pair((2, 2, 3, 3), (16, 12, 128, 128))


def relations(inputs):
  """Returns queries, keys and values of student and teacher."""
  batch, length, narrow, wide = inputs.size((2, 3, 4, 6), (8, 128, 384, 768))
  return tuple(
    tuple(inputs.floats(batch, length, width) for _ in range(3)) for width in (narrow, wide)
  )


def layers(inputs):
  """Returns maps of two layers each, and parameters: queries, keys, bilinear form, positions."""
  student = (
    [(2, 4, 4, 3), (2, 2, 2, 5)] if not inputs.real else [(64, 32, 32, 32), (64, 16, 16, 64)]
  )
  teacher = (
    [(2, 2, 2, 6), (2, 1, 1, 4)] if not inputs.real else [(64, 16, 16, 128), (64, 8, 8, 256)]
  )
  width = inputs.size(3, 128)
  student_maps, teacher_maps = (
    tuple(inputs.floats(*shape) for shape in shapes) for shapes in (student, teacher)
  )
  queries, keys = (
    tuple(inputs.floats(x.shape[-1], width) for x in maps) for maps in (teacher_maps, student_maps)
  )
  positions = inputs.floats(2, width), inputs.floats(2, width)
  return student_maps, teacher_maps, (queries, keys, inputs.floats(2, width, width), *positions)


def kernels(inputs):
  shape = inputs.size((2, 3), (768, 768))
  return tuple({name: inputs.floats(*shape) for name in "abcd"} for _ in range(2))


def lattice(inputs):
  batch, frames, nodes, classes = inputs.size((2, 3, 3, 5), (4, 100, 25, 512))
  labels = 1 + inputs.integers(classes - 1, batch, nodes - 1)
  return *(inputs.floats(batch, frames, nodes, classes) for _ in range(2)), labels


def spikes(inputs):
  """Returns frames of which about half are blank."""
  student, teacher = inputs.pair((3, 6, 5), (32, 100, 512))
  teacher[:, ::2, 0] += 9
  return student, teacher


def frames(inputs):
  return inputs.pair((3, 6, 5), (32, 100, 512))


def edges(inputs):
  return inputs.pair((2, 3, 4, 5), (8, 1000, 4, 17))


def boxes(inputs):
  """Returns maps, the weights of the foreground, and both context blocks."""
  student, teacher = inputs.pair((2, 3, 4, 6), (4, 32, 32, 256))
  foreground = np.maximum(inputs.floats(*student.shape[:3]), 0)
  width, half = student.shape[-1], student.shape[-1] // 2
  shapes = [((width,), ()), ((width, half), (half,)), ((half,), (half,)), ((half, width), (width,))]
  blocks = [tuple(tuple(inputs.floats(*s) / 4 for s in pair) for pair in shapes) for _ in range(2)]
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
  Case("adaptive_kl", logits, {"head_mass": 0.5, "temperature": 4.0}),
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
  Case("minifinetuning", labeled, {"threshold": 0.2, "temperature": 2.0}),
  Case("minillm_single_step", labeled, {"teacher_mixing": 0.2, "temperature": 2.0}),
  Case("dist", logits, {"beta": 2.0, "gamma": 1.5, "temperature": 4.0}, peer=TORCHDISTILL),
  Case("class_gram", logits, {"temperature": 4.0}),
  Case("batch_gram", logits, {"temperature": 4.0}),
  Case("uskd", labeled, {"alpha": 0.5, "beta": 0.2, "mu": 0.1}),
  Case("sparse_kl", top_classes),
  Case("sparse_kl_conditional", top_classes),
  Case("sparse_kl_smoothed", top_classes),
  Case("sparse_jensen_shannon", top_classes, {"teacher_weight": 0.1}),
  Case("sampled_cross_entropy", random_samples),
  Case("hint", maps, images=True),
  Case("l1", maps, images=True),
  Case("pad", uncertain, peer=TORCHDISTILL),
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
  Case("affinity", maps, images=True),
  Case("ifv", labeled_pixels, {"num_classes": 3}, images=True),
  Case("vitkd", vit_tokens, {"alpha": 0.3, "beta": 0.2}),
  Case("kdsvd", adjacent_maps, {"k": 2}, images=True),
  Case("dark_rank", rows, {"alpha": 0.1, "beta": 3.0, "length": 3}),
  Case("correlation", rows),
  Case("info_nce", rows, {"temperature": 0.07}),
  Case("queue_similarity", queue, {"student_temperature": 0.2, "teacher_temperature": 0.1}),
  Case("crd", memory, {"temperature": 0.07, "momentum": 0.5}, peer=TORCHDISTILL),
  Case("dino", views, {"student_temperature": 0.1, "teacher_temperature": 0.07, "momentum": 0.9}),
  Case("attention_scores_mse", scores),
  Case("attention_kl", scores),
  Case("attention_cross_entropy", scores),
  Case("minilm_relations", relations, {"relation_heads": 2}),
  Case("layer_attention", layers, images=True),
  Case("weight_alignment", kernels),
  Case("rnnt_three_way", lattice),
  Case("ctc_frames", spikes, {"mode": "collapsed", "temperature": 3.0}),
  Case("ctc_mean", frames, {"temperature": 0.5}),
  Case("fgd", boxes, {"temperature": 0.5, "relation": 1e-3}, images=True),
]

_INPUTS = Inputs(real=False)
PUBLISHED = {  # Inputs of test_golden.py for what published packages define in another way.
  "logits": _INPUTS.pair((4, 7), ()),
  "labels": _INPUTS.integers(7, 4),
  "tokens": _INPUTS.pair((2, 3, 7), ()),
  "tokens_labels": np.array([[1, 2, -100], [-100, 5, -100]]),
  "rows": _INPUTS.pair((5, 6), ()),
  "maps": _INPUTS.pair((3, 4, 4, 5), ()),
  "two_layers": tuple((_INPUTS.floats(3, 4, 4, 5), _INPUTS.floats(3, 4, 4, 1)) for _ in range(2)),
  "memory": memory(_INPUTS),
}


def repository_inputs() -> dict[str, Any]:
  """Returns the inputs of make_golden_repositories.py and test_golden_repositories.py."""
  inputs = Inputs(real=False)
  student, weak = logits(inputs)
  tokens = inputs.pair((2, 3, 7), ())
  scores_ = tuple(np.abs(x) for x in scores(inputs))
  layers_ = tuple((inputs.floats(2, 3, 3, 6), inputs.floats(2, 2, 2, 5)) for _ in range(2))
  pixels = inputs.integers(4, 2, 6, 8)
  return {
    "rows": rows(inputs),
    "labeled": (student, weak, inputs.integers(7, len(student))),
    "rarest": (student, student[:, ::-1] / 2 + student, student.argmin(-1)),
    "tokens": (*tokens, inputs.integers(7, 2, 3)),
    "scores": scores_,
    "maps": (*segmentation(inputs), np.where(pixels == 3, 255, pixels)),
    "layers": layers_,
    "vit": vit_tokens(inputs)[:2],
    "masked": np.tile([True, False, False, True], (2, 1)),
    "regions": np.arange(24).reshape(2, 3, 4) % 5 % 2,
    "memory": (inputs.floats(3, 4, 5), inputs.floats(3, 2, 5)),
  }
