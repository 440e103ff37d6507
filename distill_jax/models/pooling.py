"""Max pooling that is fast to differentiate on every backend."""

import jax


def max_pool(x: jax.Array) -> jax.Array:
  """Largest value of each 2x2 patch of a map [B, H, W, C]; patches do not overlap.

  Reshape and maximum, because the gradient of `nnx.max_pool` (select-and-scatter) is slow on CPU. The values
  are those of `nnx.max_pool(x, (2, 2), (2, 2))`, and so are the gradients, except that equal maxima of a
  patch share theirs where `nnx.max_pool` gives it to the first.

  An odd last row or column is dropped (padding "VALID"). An axis of length 1 stays as it is, so no map
  vanishes.

  Returns:
    [B, max(1, H // 2), max(1, W // 2), C].
  """
  batch, height, width, channels = x.shape
  high, wide = min(2, height), min(2, width)
  rows, columns = height // high, width // wide
  patches = x[:, : rows * high, : columns * wide].reshape(batch, rows, high, columns, wide, channels)
  return patches.max((2, 4))
