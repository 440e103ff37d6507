"""Float64 references of the losses on features, one example at a time, from the formulas."""

import itertools
import math

import numpy as np
from logit_references import kl, softmax


def each(f):
  """Returns `f` of the examples one by one; arguments after student and teacher are shared."""
  return lambda s, t, *rest, **kwargs: np.array([f(a, b, *rest, **kwargs) for a, b in zip(s, t)])


def unit(x):
  return x / np.linalg.norm(x)


def smooth_l1(x):
  return np.where(np.abs(x) < 1, 0.5 * x**2, np.abs(x) - 0.5)


@each
def hint(s, t):
  return np.mean(np.square(s - t))


@each
def l1(s, t):
  return np.mean(np.abs(s - t))


def pad(s, t, log_variance):
  return np.array(
    [np.mean((a - b) ** 2) / (np.exp(v) + 1e-6) + v for a, b, v in zip(s, t, log_variance)]
  )


def cosine(s, t):
  return 1 - np.einsum("...c,...c->...", s, t) / np.linalg.norm(s, axis=-1) / np.linalg.norm(
    t, axis=-1
  )


@each
def attention_transfer(s, t, *, p=2, squared=True):
  maps = [unit(np.mean(np.abs(x) ** p, axis=-1).ravel()) for x in (s, t)]
  return np.mean((maps[0] - maps[1]) ** 2) if squared else np.linalg.norm(maps[0] - maps[1])


@each
def importance_map(s, t, *, p=4):
  maps = [np.array([np.mean(np.abs(x[i]) ** p) for i in np.ndindex(x.shape[:-1])]) for x in (s, t)]
  return sum((a - b) ** 2 for a, b in zip(*map(unit, maps)))


@each
def nst(s, t):
  s, t = ([unit(x[..., c].ravel()) for c in range(x.shape[-1])] for x in (s, t))

  def kernel(a, b):
    return np.mean([(x @ y) ** 2 for x in a for y in b])

  return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


def fsp(student, teacher):
  def flow(maps):
    a, b = maps
    return np.stack(
      [np.mean([np.outer(x[i], y[i]) for i in np.ndindex(x.shape[:-1])], 0) for x, y in zip(a, b)]
    )

  return ((flow(student) - flow(teacher)) ** 2).mean((1, 2))


@each
def factor_transfer(s, t, *, p=1):
  return np.mean(np.abs(unit(s.ravel()) - unit(t.ravel())) ** p)


@each
def inter_channel(s, t):
  grams = []
  for x in (s, t):
    flat = x.reshape(-1, x.shape[-1])
    grams.append(np.stack([unit(row) for row in flat.T @ flat]))
  return ((grams[0] - grams[1]) ** 2).sum() / s.shape[-1]


@each
def affinity(s, t):
  flat = [x.reshape(-1, x.shape[-1]) for x in (s, t)]
  a, b = (np.array([[unit(x) @ unit(y) for y in rows] for x in rows]) / len(rows) for rows in flat)
  return sum(np.linalg.norm(x - y) for x, y in zip(a, b))


@each
def activation_boundary(s, t, *, margin=1.0):
  total = 0.0
  for a, b in zip(s.ravel(), t.ravel()):
    total += (a + margin) ** 2 * (a > -margin and b <= 0) + (a - margin) ** 2 * (
      a <= margin and b > 0
    )
  return total


@each
def ofd(s, t, margin):
  total = 0.0
  for index in np.ndindex(s.shape):
    a, b, m = s[index], t[index], margin[index[-1]]
    if b > 0:
      total += (a - b) ** 2
    elif b > m:
      total += (a - b) ** 2 * (a > b)
    else:
      total += (a - m) ** 2 * (a > m)
  return total


@each
def review_kd(s, t, *, levels=(4, 2, 1)):
  def pool(x, bins):
    out = np.zeros((bins, bins, x.shape[2]))
    for i, j in np.ndindex(bins, bins):
      low = [math.floor(k * n / bins) for k, n in zip((i, j), x.shape)]
      high = [math.ceil((k + 1) * n / bins) for k, n in zip((i, j), x.shape)]
      out[i, j] = x[low[0] : high[0], low[1] : high[1]].mean((0, 1))
    return out

  weight, value, total = 1.0, np.mean((s - t) ** 2), 1.0
  for level in levels:
    if level < min(s.shape[:2]):
      weight /= 2
      value += weight * np.mean((pool(s, level) - pool(t, level)) ** 2)
      total += weight
  return value / total


@each
def mgd(s, t):
  return np.square(s - t).sum()


@each
def vid(s, t, raw_scale):
  v = np.log(1 + np.exp(raw_scale)) + 1e-5
  return 0.5 * np.mean((s - t) ** 2 / v + np.log(v))


def srd(s, t, *, power=4.0):
  def norm(x):
    flat = x.reshape(-1, x.shape[-1])
    return (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-4)

  return np.log((np.abs(norm(s) - norm(t)) ** power).sum())


@each
def vkd(s, t):
  mean, var = t.mean(-1, keepdims=True), t.var(-1, keepdims=True)
  return smooth_l1(s - (t - mean) / np.sqrt(var + 1e-5)).mean()


@each
def cwd(s, t, *, temperature=4.0):
  flat = [x.reshape(-1, x.shape[-1]).T for x in (s, t)]
  return temperature**2 * np.mean(
    [kl(softmax(b, temperature), softmax(a, temperature)) for a, b in zip(*flat)]
  )


def pearson(s, t):
  def standard(x):
    flat = x.reshape(-1, x.shape[-1])
    return (flat - flat.mean(0)) / (flat.std(0, ddof=1) + 1e-6)

  return ((standard(s) - standard(t)) ** 2).mean() / 2


def score_weighted(s, t, scores):
  errors = [scores[i] * ((s[i] - t[i]) ** 2).sum() for i in np.ndindex(scores.shape)]
  return sum(errors) / (scores.sum() * s.shape[-1])


def pairs(f, x):
  x = x.reshape(len(x), -1)
  return np.array([[f(a, b) for b in x] for a in x])


def similarity_preserving(s, t):
  grams = [np.stack([unit(row) for row in pairs(np.dot, x)]) for x in (s, t)]
  return ((grams[0] - grams[1]) ** 2).sum() / len(s) ** 2


def rkd_distance(s, t):
  distances = [pairs(lambda a, b: np.linalg.norm(a - b), x) for x in (s, t)]
  scaled = [d * len(d) * (len(d) - 1) / d.sum() for d in distances]
  return smooth_l1(scaled[0] - scaled[1]).mean()


def rkd_angle(s, t):
  def angle(x, i, j, k):
    a, b = x[j] - x[i], x[k] - x[i]
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b) if i not in (j, k) else 0.0

  s, t = (x.reshape(len(x), -1) for x in (s, t))
  triples = list(itertools.product(range(len(s)), repeat=3))
  return np.mean([smooth_l1(angle(s, *ijk) - angle(t, *ijk)) for ijk in triples])


def pkt(s, t):
  q, p = (pairs(lambda a, b: (unit(a) @ unit(b) + 1) / 2, x) for x in (s, t))
  q, p = (x / x.sum(1, keepdims=True) for x in (q, p))
  return (p * np.log((p + 1e-7) / (q + 1e-7))).mean()


def correlation_congruence(s, t, *, kernel="gaussian", gamma=0.4, degree=2):
  def gaussian(a, b):
    x = unit(a) @ unit(b)
    return np.exp(-2 * gamma) * sum(
      (2 * gamma * x) ** p / math.factorial(p) for p in range(degree + 1)
    )

  f = np.dot if kernel == "bilinear" else gaussian
  return ((pairs(f, s) - pairs(f, t)) ** 2).mean()


def dark_rank(s, t, *, alpha=3.0, beta=3.0, length=4):
  s, t = (x.reshape(len(x), -1) for x in (s, t))
  total = 0.0
  for i in range(len(s)):
    nearest = sorted(set(range(len(s))) - {i}, key=lambda j: np.linalg.norm(t[i] - t[j]))[:length]
    scores = [-alpha * np.linalg.norm(s[i] - s[j]) ** beta for j in nearest]
    total -= sum(a - np.logaddexp.reduce(scores[k:]) for k, a in enumerate(scores))
  return total / len(s)


def correlation(s, t):
  errors = np.abs(s - t).reshape(len(s), -1)
  return np.mean([a @ b for a, b in zip(errors, errors[1:])])


def classes_at(x, labels, num_classes, ignore_label):
  """Returns the class of each position of one map that counts: the nearest pixel's."""
  classes = {}
  for position in np.ndindex(x.shape[:-1]):
    pixel = tuple(i * n // size for i, n, size in zip(position, labels.shape, x.shape))
    if labels[pixel] >= 0 and labels[pixel] != ignore_label:
      assert labels[pixel] < num_classes
      classes[position] = labels[pixel]
  return classes


def class_means(x, classes):
  return {
    y: np.mean([x[i] for i in classes if classes[i] == y], 0) for y in sorted(set(classes.values()))
  }


def ifv(s, t, labels, *, num_classes, ignore_label):
  values = []
  for *maps, pixels in zip(s, t, labels):
    cosines = []
    for x in maps:
      classes = classes_at(x, pixels, num_classes, ignore_label)
      means = class_means(x, classes)
      cosines.append([unit(x[i]) @ unit(means[y]) for i, y in classes.items()])
    values.append(np.mean(np.square(np.subtract(*cosines))))
  return np.array(values)


def region_affinity(s, t, labels, *, num_classes, ignore_label):
  values = []
  for *maps, pixels in zip(s, t, labels):
    cosines = []
    for x in maps:
      means = class_means(x, classes_at(x, pixels, num_classes, ignore_label)).values()
      cosines.append([unit(a) @ unit(b) for a, b in itertools.combinations(means, 2)])
    values.append(np.mean(np.square(np.subtract(*cosines))) if cosines[0] else 0)
  return np.array(values)


@each
def pairwise_similarity(s, t, *, pool=0.5):
  def patches(x):
    sides = [max(1, int(pool * n)) for n in x.shape[:-1]]
    counts = [-(-n // side) for n, side in zip(x.shape, sides)]
    slices = [
      tuple(slice(i * side, (i + 1) * side) for i, side in zip(index, sides))
      for index in np.ndindex(*counts)
    ]
    return [unit(x[part].reshape(-1, x.shape[-1]).max(0)) for part in slices]

  a, b = (np.array([[x @ y for y in rows] for x in rows]) for rows in (patches(s), patches(t)))
  return np.mean((a - b) ** 2)


def vitkd(student, teacher, masked, *, alpha=3e-5, beta=3e-6):
  values = []
  for low_s, deep_s, low_t, deep_t, m in zip(*student, *teacher, masked):
    generation = np.square(deep_s - deep_t)[m].sum() * len(m) / m.sum()
    values.append(alpha * np.square(low_s - low_t).sum() + beta * generation)
  return np.array(values)


def kdsvd(student, teacher, *, k=1):
  def directions(s, t):
    flat = [x.reshape(-1, x.shape[-1]) for x in (s, t)]
    (_, _, s_vectors), (_, t_values, t_vectors) = (np.linalg.svd(x) for x in flat)
    sides = [[], []]
    for value, v in zip(t_values[:k] / np.linalg.norm(t_values[:k]), t_vectors):
      v = v * np.sign(v[np.abs(v).argmax()])
      u = max(s_vectors[: k + 3], key=lambda u: abs(u @ v))
      for side, vector in zip(sides, (u * np.sign(u @ v), v)):
        side.append(value * vector)
    return sides

  def kernel(a, b):
    return np.exp(-((np.stack(a)[:, :, None] - np.stack(b)[:, None]) ** 2) / 8)

  values = []
  for maps in zip(*student, *teacher):
    layers = [directions(s, t) for s, t in zip(maps[: len(student)], maps[len(student) :])]
    pairs = zip(layers, layers[1:])
    values.append(sum(((kernel(b[0], a[0]) - kernel(b[1], a[1])) ** 2).sum() for a, b in pairs))
  return np.array(values)
