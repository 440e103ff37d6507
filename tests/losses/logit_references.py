"""Float64 references of the logit losses, from the formulas and with probabilities rather than log space."""

import numpy as np


def softmax(z, temperature=1.0):
  e = np.exp((z - z.max(-1, keepdims=True)) / temperature)
  return e / e.sum(-1, keepdims=True)


def kl(p, q):
  return (p * np.log(p / q)).sum(-1)


def kl_divergence(s, t, *, temperature=1.0):
  return temperature**2 * kl(softmax(t, temperature), softmax(s, temperature))


def soft_cross_entropy(s, t, *, temperature=1.0):
  return -(temperature**2) * (softmax(t, temperature) * np.log(softmax(s, temperature))).sum(-1)
