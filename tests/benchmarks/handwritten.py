"""Defines the distillation step written by hand for these networks, with jax.numpy, lax and optax.

Parameters are nested dicts with the names of the library's networks, so both take one tree.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

TEMPERATURE, HARD = 4.0, 0.1


def mlp(params, stats, images, *, train):
  """Applies `{'hidden': {0: {'kernel', 'bias'}, ...}, 'head': ...}`, without statistics."""
  del train
  x = images.reshape(len(images), -1)
  for i in range(len(params["hidden"])):
    layer = params["hidden"][i]
    x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
  return x @ params["head"]["kernel"] + params["head"]["bias"], stats


def cnn(params, stats, images, *, train):
  """Applies `{'blocks': {0: {'conv', 'norm'}, ...}, 'head': ...}`."""
  x: jax.Array = images
  new_stats: dict = {}
  for i in range(len(params["blocks"])):
    x, new_stats[i] = conv_norm_relu(params["blocks"][i], stats["blocks"][i], x, train)
    x = max_pool(x)
  return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"], {"blocks": new_stats}


def vgg(params, stats, images, *, train):
  """Applies `{'blocks': {0: {0: {'conv', 'norm'}, ...}, ...}, 'head': ...}`."""
  x: jax.Array = images
  new_stats: dict = {}
  for i in range(len(params["blocks"])):
    layers, new_stats[i] = params["blocks"][i], {}
    for j in range(len(layers)):
      x, new_stats[i][j] = conv_norm_relu(layers[j], stats["blocks"][i][j], x, train)
    x = max_pool(x)
  return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"], {"blocks": new_stats}


def conv_norm_relu(params, stats, x, train):
  x = lax.conv_general_dilated(
    x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  mean, var = stats["norm"]["mean"], stats["norm"]["var"]
  if train:
    mean = x.mean((0, 1, 2))
    var = jnp.maximum(0, (x * x).mean((0, 1, 2)) - mean * mean)
    old = stats["norm"]
    stats = {"norm": {"mean": 0.9 * old["mean"] + 0.1 * mean, "var": 0.9 * old["var"] + 0.1 * var}}
  x = (x - mean) * (lax.rsqrt(var + 1e-5) * params["norm"]["scale"]) + params["norm"]["bias"]
  return jax.nn.relu(x), stats


def max_pool(x):
  """Returns the maxima of 2x2 windows, by reshaping: the fast way."""
  n, h, w, c = x.shape
  high, wide = min(2, h), min(2, w)
  rows, columns = h // high, w // wide
  return x[:, : rows * high, : columns * wide].reshape(n, rows, high, columns, wide, c).max((2, 4))


def make_step(student, teacher, optimizer):
  """Returns `(state, teacher_variables, images, labels) -> (state, loss, accuracy)`.

  A state is (params, stats, opt_state), the teacher's variables are (params, stats).
  """

  def step(state, teacher_variables, images, labels):
    params, stats, opt_state = state
    target = teacher(*teacher_variables, images, train=False)[0]

    def loss_fn(params):
      logits, new_stats = student(params, stats, images, train=True)
      hard = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      log_p, log_q = (jax.nn.log_softmax(z / TEMPERATURE) for z in (target, logits))
      soft = TEMPERATURE**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1).mean()
      return HARD * hard + (1 - HARD) * soft, (logits, new_stats)

    (loss, (logits, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    accuracy = (logits.argmax(-1) == labels).mean()
    return (optax.apply_updates(params, updates), stats, opt_state), loss, accuracy

  return step
