"""Float64 references of the losses on logits, from the formulas, with probabilities."""

import numpy as np


def softmax(z, temperature=1.0):
  e = np.exp((z - z.max(-1, keepdims=True)) / temperature)
  return e / e.sum(-1, keepdims=True)


def kl(p, q):
  return (p * np.log(p / q)).sum(-1)


def rows(f):
  """Returns `f` of the rows one by one."""
  return lambda s, t, *rest, **kwargs: np.array([f(*row, **kwargs) for row in zip(s, t, *rest)])


def without(z, y):
  return np.delete(z, y)


def kl_divergence(s, t, *, temperature=1.0):
  return temperature**2 * kl(softmax(t, temperature), softmax(s, temperature))


def reverse_kl(s, t, *, temperature=1.0):
  return temperature**2 * kl(softmax(s, temperature), softmax(t, temperature))


def soft_cross_entropy(s, t, *, temperature=1.0):
  return -(temperature**2) * (softmax(t, temperature) * np.log(softmax(s, temperature))).sum(-1)


def jensen_shannon(s, t, *, teacher_weight=0.5, temperature=1.0, normalize=False):
  p, q, w = softmax(t, temperature), softmax(s, temperature), teacher_weight
  m = w * p + (1 - w) * q
  value = temperature**2 * (w * kl(p, m) + (1 - w) * kl(q, m))
  return value / (w * (1 - w)) if normalize else value


def skew_kl(s, t, *, alpha, temperature=1.0):
  p, q = softmax(t, temperature), softmax(s, temperature)
  return temperature**2 * kl(p, alpha * p + (1 - alpha) * q)


def skew_reverse_kl(s, t, *, alpha, temperature=1.0):
  p, q = softmax(t, temperature), softmax(s, temperature)
  return temperature**2 * kl(q, (1 - alpha) * p + alpha * q)


def adaptive_kl(s, t, *, head_mass, temperature=1.0):
  values = []
  for p, q in zip(softmax(t, temperature), softmax(s, temperature)):
    head = []
    for c in np.argsort(-p):
      if p[head].sum() < head_mass:
        head.append(c)
    fraction = np.abs(p - q)[head].sum() / np.abs(p - q).sum()
    values.append(fraction * kl(p, q) + (1 - fraction) * kl(q, p))
  return temperature**2 * np.array(values)


def total_variation(s, t, *, temperature=1.0):
  return np.abs(softmax(t, temperature) - softmax(s, temperature)).sum(-1) / 2


def logit_mse(s, t):
  return np.mean((s - t) ** 2, axis=-1)


def margin_mse(s, t):
  margins = [x[..., :1] - x[..., 1:] for x in (s, t)]
  return np.mean((margins[0] - margins[1]) ** 2, axis=-1)


@rows
def hard_distillation(s, t, *, label_smoothing=0.0):
  label = np.full(len(s), label_smoothing / len(s))
  label[t.argmax()] += 1 - label_smoothing
  return -(label * np.log(softmax(s))).sum()


@rows
def binary_kl(s, t, *, temperature=1.0):
  total = 0.0
  for a, b in zip(s / temperature, t / temperature):
    q, p = 1 / (1 + np.exp(-a)), 1 / (1 + np.exp(-b))
    total += kl(np.array([p, 1 - p]), np.array([q, 1 - q]))
  return temperature**2 * total


@rows
def dkd(s, t, y, *, alpha=1.0, beta=8.0, temperature=4.0):
  p, q = softmax(t, temperature), softmax(s, temperature)
  target = kl(np.array([p[y], 1 - p[y]]), np.array([q[y], 1 - q[y]]))
  others = kl(without(p, y) / (1 - p[y]), without(q, y) / (1 - q[y]))
  return temperature**2 * (alpha * target + beta * others)


@rows
def nkd(s, t, y, *, gamma=1.5, temperature=1.0):
  others = (softmax(without(t, y), temperature) * np.log(softmax(without(s, y), temperature))).sum()
  return -softmax(t)[y] * np.log(softmax(s)[y]) - gamma * temperature**2 * others


@rows
def wsld(s, t, y, *, temperature=2.0):
  ratio = np.log(softmax(s)[y]) / (np.log(softmax(t)[y]) - 1e-7)
  soft = -(softmax(t, temperature) * np.log(softmax(s, temperature))).sum()
  return temperature**2 * (1 - np.exp(-ratio)) * soft


@rows
def ofa(s, t, y, *, eps):
  p, log_q = softmax(t), np.log(softmax(s))
  return -((1 + p[y]) ** eps - 1) * log_q[y] - sum(p[c] * log_q[c] for c in range(len(p)) if c != y)


@rows
def minifinetuning(s, t, y, *, threshold, temperature=1.0):
  p, label = softmax(t, temperature), np.eye(len(t))[y]
  if p.argmax() == y:
    a = (min(p[y] + threshold, 1) - p[y]) / (1 - p[y])
  else:
    a = (p.max() - p[y] + threshold) / (1 + p.max() - p[y])
  corrected = (1 - a) * p + a * label
  with np.errstate(divide="ignore", invalid="ignore"):
    terms = np.where(corrected > 0, corrected * np.log(corrected / softmax(s, temperature)), 0)
  return temperature**2 * terms.sum()


@rows
def minillm_single_step(s, t, y, *, teacher_mixing, temperature=1.0):
  p, q = softmax(t, temperature), softmax(s, temperature)
  weight = q[y] / (teacher_mixing * p[y] + (1 - teacher_mixing) * q[y])
  return weight * temperature**2 * kl(q, p)


@rows
def uld(s, t):
  q, p = (np.zeros(len(t)) for _ in range(2))
  q[: len(s)], p[:] = sorted(softmax(s), reverse=True), sorted(softmax(t), reverse=True)
  return sum(abs(a - b) for a, b in zip(p, q))


def uskd(s, w, labels, *, alpha=1.0, beta=0.1, mu=0.005):
  q_label = np.array([softmax(a)[y] for a, y in zip(s, labels)])
  soft = q_label**2 + 1 - np.mean(q_label**2)
  total = 0.0
  for a, b, y, p in zip(s, w, labels, soft):
    q, others = softmax(a), np.delete(np.arange(len(a)), y)
    score = q[others] / (1 - q[y]) + softmax(b)[others] / (1 - softmax(b)[y])
    zipf = 1 / (1 + np.array([(score > x).sum() for x in score]))
    smooth = 0.9 * np.eye(len(a))[y] + 0.1 / len(a)
    total -= alpha * p * np.log(q[y])
    total -= beta * (zipf / zipf.sum() * np.log(q[others] / (1 - q[y]))).sum()
    total -= mu * (smooth * np.log(softmax(b))).sum()
  return total / len(s)


def correlation(a, b):
  return np.cov(a, b)[0, 1] * (len(a) - 1) / (np.std(a) * np.std(b) * len(a) + 1e-8)


def dist(s, t, *, beta=1.0, gamma=1.0, temperature=1.0):
  q, p = softmax(s, temperature), softmax(t, temperature)
  within = np.mean([1 - correlation(a, b) for a, b in zip(q, p)])
  along = np.mean([1 - correlation(a, b) for a, b in zip(q.T, p.T)])
  return temperature**2 * (beta * within + gamma * along)


def class_gram(s, t, *, temperature=1.0):
  q, p = softmax(s, temperature), softmax(t, temperature)
  return np.linalg.norm(p.T @ p - q.T @ q, "fro") ** 2 / s.shape[1]


def batch_gram(s, t, *, temperature=1.0):
  q, p = softmax(s, temperature), softmax(t, temperature)
  return np.linalg.norm(p @ p.T - q @ q.T, "fro") ** 2 / s.shape[0]


@rows
def sparse(s, t, *, k, temperature, tail, divergence=kl):
  """Returns KL of the top `k` classes; `tail`: bucket, conditional or smoothed."""
  p, q = softmax(t, temperature), softmax(s, temperature)
  top = np.argsort(-p)[:k]
  rest = np.setdiff1d(np.arange(len(p)), top)
  if tail == "bucket":
    a, b = np.append(p[top], p[rest].sum()), np.append(q[top], q[rest].sum())
  elif tail == "conditional":
    a, b = p[top] / p[top].sum(), q[top] / q[top].sum()
  else:
    a, b = np.where(np.isin(np.arange(len(p)), top), p, p[rest].mean()), q
  return temperature**2 * divergence(a, b)


def sparse_jensen_shannon(s, t, *, teacher_weight, **options):
  def divergence(p, q):
    m = teacher_weight * p + (1 - teacher_weight) * q
    return teacher_weight * kl(p, m) + (1 - teacher_weight) * kl(q, m)

  return sparse(s, t, tail="bucket", divergence=divergence, **options)


def rnnt_three_way(s, t, labels, *, blank=0):
  q, p = softmax(s), softmax(t)
  batch, frames, nodes, _ = s.shape
  out = np.zeros((batch, frames, nodes))
  for b, f, u in np.ndindex(out.shape):
    classes = [blank] + ([labels[b, u]] if u < nodes - 1 else [])
    three = [np.append(x[b, f, u, classes], 1 - x[b, f, u, classes].sum()) for x in (p, q)]
    out[b, f, u] = kl(*three)
  return out


def ctc_frames(s, t, *, blank=0, mode="all", temperature=1.0):
  out = []
  for q, p in zip(softmax(s, temperature), softmax(t, temperature)):
    if p.argmax() == blank and mode == "nonblank":
      out.append(0)
    elif p.argmax() == blank and mode == "collapsed":
      out.append(kl(np.array([p[blank], 1 - p[blank]]), np.array([q[blank], 1 - q[blank]])))
    else:
      out.append(kl(p, q))
  return temperature**2 * np.array(out)


def ctc_mean(s, t, *, temperature=1.0):
  return temperature**2 * kl(softmax(t, temperature).mean(1), softmax(s, temperature).mean(1))


def localization(s, t, *, temperature=10.0):
  return np.array(
    [[kl_divergence(*edge, temperature=temperature) for edge in zip(*box)] for box in zip(s, t)]
  ).sum(1)
