"""Terms of detectors in float64, from the formulas, and networks' outputs to compare."""

import functools

import numpy as np
from terms_by_hand import softmax64

ROWS, CLASSES, BINS = 3, 4, 5
WHERE = np.array([True, False, True])
GRIDS = {"p3": (8, 8), "p4": (4, 4)}  # The teacher's; strides 8 and 16 of images of 64 x 64.
STUDENT_GRIDS = {"p3": (4, 4), "p4": (8, 8)}
LOCATIONS = sum(height * width for height, width in GRIDS.values())


def each(f):
  """Returns `f` of the examples one by one."""
  return lambda *args, **kwargs: np.array([f(*example, **kwargs) for example in zip(*args)])


@functools.cache
def outputs():
  """Student, teacher and batch; the row that does not count is NaN."""
  rng = np.random.default_rng(0)

  def rows(*shape):
    x = rng.normal(size=(ROWS, *shape)).astype(np.float32)
    return np.where(WHERE.reshape(-1, *[1] * len(shape)), x, np.float32(np.nan))

  def network(grids, width):
    return {
      **{name: rows(*grid, width) for name, grid in grids.items()},
      "class_logits": 2 * rows(LOCATIONS, CLASSES),
      "box_bins": rows(LOCATIONS, 4, BINS),
    }

  corners = rng.uniform(0, 40, (ROWS, 4, 2))
  boxes = np.concatenate([corners, corners + rng.uniform(4, 24, corners.shape)], -1)
  boxes[:, 3] = 0  # Padding.
  label = np.array([[0, 1, 2, -1]] * ROWS)
  batch = {
    "where": WHERE,
    "boxes": boxes.astype(np.float32),
    "label": label.astype(np.int32),
    "crowd": np.zeros(label.shape, bool),
  }
  return network(STUDENT_GRIDS, 3), network(GRIDS, 5), batch


# Parts


def dense(params, x):
  return np.asarray(x, np.float64) @ np.float64(params["kernel"]) + np.float64(params["bias"])


def conv(params, x):
  """A 3x3 convolution as a sum over its window."""
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  _, height, width, _ = x.shape
  shifts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
  kernels = np.float64(params["kernel"]).reshape(9, *params["kernel"].shape[2:])
  return sum(shift @ kernel for shift, kernel in zip(shifts, kernels)) + np.float64(params["bias"])


def resized(x, size):
  """Linear interpolation between the centers of pixels; a triangle of two new pixels if smaller."""
  for axis, new in enumerate(size, start=1):
    old = x.shape[axis]
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.maximum(0, 1 - abs(np.arange(old) - centers[:, None]) / max(old / new, 1))
    weights /= weights.sum(1, keepdims=True)
    x = np.moveaxis(np.tensordot(weights, x, (1, axis)), 0, axis)
  return x


def kl(p, q):
  return (p * (np.log(p) - np.log(q))).sum(-1)


def sigmoid(z):
  return 1 / (1 + np.exp(-np.float64(z)))


# Losses of maps, of one example unless they relate rows


def foreground(boxes, counted, stride, grid):
  """1 / area of the smallest box at each position, in positions."""
  weights = np.zeros(grid)
  for box in boxes[counted] / stride:
    left, top = np.floor(box[:2]).astype(int)
    right, bottom = np.ceil(box[2:]).astype(int)
    area = (right - left + 1) * (bottom - top + 1)
    for y in range(max(top, 0), min(bottom, grid[0] - 1) + 1):
      for x in range(max(left, 0), min(right, grid[1] - 1) + 1):
        weights[y, x] = max(weights[y, x], 1 / area)
  return weights


def attention(x, temperature):
  """Where the map is active, with sum H W, and in which channels, with sum C."""
  size = abs(x)
  space = softmax64(size.mean(-1).ravel() / temperature) * size.shape[0] * size.shape[1]
  channels = softmax64(size.mean((0, 1)) / temperature) * size.shape[2]
  return space.reshape(size.shape[:2]), channels


def context(x, block):
  block = [[np.float64(x) for x in pair] for pair in block]
  (pool, pool_bias), (narrow, narrow_bias), (scale, shift), (wide, wide_bias) = block
  where = softmax64((x @ pool + pool_bias).ravel()).reshape(x.shape[:2])
  hidden = (where[..., None] * x).sum((0, 1)) @ narrow + narrow_bias
  hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5) * scale + shift
  return x + np.maximum(hidden, 0) @ wide + wide_bias


def fgd(s, t, weights, blocks, *, temperature=0.5, alpha=1e-3, beta=5e-4, gamma=1e-3, relation):
  (space_s, channels_s), (space_t, channels_t) = (attention(x, temperature) for x in (s, t))
  error = (s - t) ** 2 * space_t[..., None] * channels_t
  outside = weights == 0
  value = alpha * (weights[..., None] * error).sum()
  value += beta * error[outside].sum() / max(outside.sum(), 1)
  value += gamma * (abs(space_s - space_t).sum() + abs(channels_s - channels_t).sum())
  return value + relation * ((context(s, blocks[0]) - context(t, blocks[1])) ** 2).sum()


def mgd(params, s, t, unmasked):
  hidden = np.maximum(conv(params["0"], s * unmasked), 0)
  return ((conv(params["1"], hidden) - t) ** 2).sum((1, 2, 3))


def pearson(s, t):
  """Of all rows: half the squared difference of standardized channels, ddof 1."""

  def standard(x):
    flat = x.reshape(-1, x.shape[-1])
    return (flat - flat.mean(0)) / (flat.std(0, ddof=1) + 1e-6)

  return ((standard(s) - standard(t)) ** 2).mean() / 2


@each
def cwd(s, t, *, temperature=4.0):
  p, q = (softmax64(x.reshape(-1, x.shape[-1]).T / temperature) for x in (t, s))
  return temperature**2 * kl(p, q).mean()


def score_weighted(s, t, scores):
  """Of all rows: the normalizer is the sum of the scores times the channels."""
  return (scores[..., None] * (s - t) ** 2).sum() / (scores.sum() * s.shape[-1])


# Losses of heads, [B, A]


def binary_kl(s, t, *, temperature=1.0):
  p, q = sigmoid(t / temperature), sigmoid(s / temperature)
  both = np.stack([p, 1 - p], -1), np.stack([q, 1 - q], -1)
  return temperature**2 * kl(*both).sum(-1)


def kl_divergence(s, t, *, temperature=1.0):
  return temperature**2 * kl(softmax64(t / temperature), softmax64(s / temperature))


def localization(s, t, *, temperature=10.0):
  return kl_divergence(s, t, temperature=temperature).sum(-1)


def confidence(z, background=False):
  return softmax64(z)[..., :-1].max(-1) if background else sigmoid(z).max(-1)


def locations(values, weights):
  return np.array([(v * w).sum() / w.sum() for v, w in zip(values, weights)])
