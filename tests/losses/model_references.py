"""Float64 references of the losses on attention, layers, memories and detectors' maps."""

import numpy as np
from logit_references import kl, softmax
from map_references import each, unit


def info_nce(s, t, *, temperature=0.07):
  rows = [softmax(np.array([unit(a) @ unit(b) for b in t]), temperature) for a in s]
  return -np.mean([np.log(row[i]) for i, row in enumerate(rows)])


@each
def queue_similarity(s, t, queue, *, student_temperature=0.2, teacher_temperature=0.01):
  others = [unit(t), *(unit(x) for x in queue)]
  p = softmax(np.array([unit(t) @ x for x in others]), teacher_temperature)
  q = softmax(np.array([unit(s) @ x for x in others]), student_temperature)
  return -(p * np.log(q)).sum()


def crd(s, t, indices, negatives, state, *, temperature=0.07, momentum=0.5):
  size = len(state.student)
  total = np.zeros(len(s))
  for rows, memory, z in (
    (s, state.teacher, state.normalizers[0]),
    (t, state.student, state.normalizers[1]),
  ):
    chosen = np.concatenate([indices[:, None], negatives], 1)
    scores = np.exp([[unit(x) @ memory[i] / temperature for i in c] for x, c in zip(rows, chosen)])
    scores = scores / (z if z > 0 else size * scores.mean())
    noise = negatives.shape[1] / size
    total -= np.log(scores[:, 0] / (scores[:, 0] + noise + 1e-7))
    total -= np.log(noise / (scores[:, 1:] + noise + 1e-7)).sum(1)
  return total


def dino(s, t, center, *, student_temperature=0.1, teacher_temperature=0.04, momentum=0.9):
  terms = []
  for i, teacher in enumerate(t):
    for j, student in enumerate(s):
      if i != j:
        p, q = softmax(teacher - center, teacher_temperature), softmax(student, student_temperature)
        terms.append(-(p * np.log(q)).sum(-1))
  return np.mean(terms, 0)


def attention_scores_mse(s, t, *, mask):
  mask = np.broadcast_to(mask, s.shape)
  return np.array([np.mean((a[m] - b[m]) ** 2) for a, b, m in zip(s, t, mask)])


def attention_kl(s, t, *, mask):
  return mean_over_queries(kl, s, t, mask)


def attention_cross_entropy(s, t, *, mask):
  return mean_over_queries(lambda p, q: -(p * np.log(q)).sum(), s, t, mask)


def mean_over_queries(compare, s, t, mask):
  mask = np.broadcast_to(mask, s.shape)
  out = []
  for a, b, m in zip(s, t, mask):
    queries = [i for i in np.ndindex(a.shape[:2]) if m[i].any()]
    out.append(np.mean([compare(softmax(b[i][m[i]]), softmax(a[i][m[i]])) for i in queries]))
  return np.array(out)


def minilm_relations(s, t, mask, *, relation_heads):
  total = 0.0
  for a, b in zip(s, t):
    values = []
    for x, y, m in zip(a, b, mask):
      relations = []
      for z in (x[m], y[m]):
        heads = np.split(z, relation_heads, axis=-1)
        relations.append([softmax(h @ h.T / np.sqrt(h.shape[1])) for h in heads])
      values.append(np.mean([kl(p, q).mean() for q, p in zip(*relations)]))
    total = total + np.array(values)
  return total


def weight_alignment(s, t):
  return np.mean([np.mean((s[name] - t[name]) ** 2) for name in s])


def layer_attention(student, teacher, params):
  out = []
  for b in range(len(student[0])):
    keys = [np.maximum(x[b].mean((0, 1)) @ w, 0) for x, w in zip(student, params.keys)]
    total = 0.0
    for i, x in enumerate(teacher):
      query = x[b].mean((0, 1)) @ params.queries[i]
      position = params.teacher_position[i]
      scores = [
        query @ params.bilinear[i] @ k + position @ p for k, p in zip(keys, params.student_position)
      ]
      weights = softmax(np.array(scores) / np.sqrt(len(query)))
      target = unit((x[b] ** 2).mean(-1).ravel())
      for weight, y in zip(weights, student):
        ratio = y.shape[1] // x.shape[1]  # the test's maps divide evenly
        pooled = y[b].reshape(x.shape[1], ratio, x.shape[2], ratio, -1).mean((1, 3))
        total += weight * np.mean((unit((pooled**2).mean(-1).ravel()) - target) ** 2)
    out.append(total)
  return np.array(out)


def fgd(
  s, t, foreground, context, *, temperature=0.5, alpha=1e-3, beta=5e-4, gamma=1e-3, relation=5e-6
):
  def attention(x):
    size = np.abs(x)
    space = (
      softmax(size.mean(2).ravel(), temperature).reshape(x.shape[:2]) * x.shape[0] * x.shape[1]
    )
    return space, softmax(size.mean((0, 1)), temperature) * x.shape[2]

  def block(x, c):
    flat = x.reshape(-1, x.shape[-1])
    pooled = softmax(flat @ c.attention[0] + c.attention[1]) @ flat
    hidden = pooled @ c.reduce[0] + c.reduce[1]
    hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5) * c.norm[0] + c.norm[1]
    return x + np.maximum(hidden, 0) @ c.expand[0] + c.expand[1]

  out = []
  for a, b, m in zip(s, t, foreground):
    (space_s, channel_s), (space_t, channel_t) = attention(a), attention(b)
    error = (a - b) ** 2 * space_t[..., None] * channel_t
    outside = m == 0
    value = alpha * (m[..., None] * error).sum() + beta * error[outside].sum() / max(
      outside.sum(), 1
    )
    value += gamma * (np.abs(space_s - space_t).sum() + np.abs(channel_s - channel_t).sum())
    value += relation * ((block(a, context[0]) - block(b, context[1])) ** 2).sum()
    out.append(value)
  return np.array(out)


def class_memory(width):
  """Returns a small memory of `cirkd`: three pixels and two regions of each of two classes."""
  rng = np.random.default_rng(width)
  memories = [rng.normal(size=(2, size, width)) for size in (3, 2)]
  return [np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True)) for x in memories]


def cirkd(s, t, *, temperature=0.1, pixel_weight=0.1, region_weight=0.1):
  s, t = (x.reshape(len(x), 2, -1) for x in (s, t))
  s, projected, t = (
    x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (s, np.roll(s, 1, -1), t)
  )

  def divergence(a, b, a_vectors, b_vectors):
    """Returns the mean of the pixels a of the student and b of the teacher to the vectors."""
    q, p = softmax(a @ a_vectors.T, temperature), softmax(b @ b_vectors.T, temperature)
    return np.mean([kl(x, y) for x, y in zip(p, q)])

  pairs = [divergence(s[i], t[i], s[j], t[j]) for i in range(len(s)) for j in range(len(s))]
  value = np.mean(pairs)
  for weight, memory in zip((pixel_weight, region_weight), class_memory(s.shape[-1])):
    vectors = np.float64(memory).reshape(-1, s.shape[-1])
    value += weight * np.mean([divergence(a, b, vectors, vectors) for a, b in zip(projected, t)])
  return value
