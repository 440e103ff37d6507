"""Vision transformers (Dosovitskiy et al. 2021), with DeiT's distillation token (Touvron et al. 2021) on request.

student = from_nnx(lambda rngs: ViT(1, 28, 10, 48, 4, 4, distilled=True, rngs=rngs))
goal = objectives.weighted(
  hard=(0.5, objectives.labels()),
  soft=(0.5, objectives.features("distillation", "logits", losses.hard_distillation, project=False)),
)
"""

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models.zoo.cnn import check_images
from distill_jax.types import Outputs


class ViT(nnx.Module):
  """Patches, a class token, blocks of attention and a perceptron, a last norm and a linear head.

  Outputs, with k = 1, 2, ... the block; of the L tokens the class token comes first, then the distillation token if
  there is one, then the patches row by row:
    embedded: [B, L, width].
    block{k}: [B, L, width]: the sum that ends the block.
    map{k}: [B, size / patch, size / patch, width]: the patches of block{k}, in their places.
    queries{k}, keys{k}, values{k}: [B, L, heads * head_width], all heads side by side.
    attention{k}: [B, heads, L, L]: scores before the softmax, float32.
    embedding: [B, width]: the class token after the last norm.
    logits: [B, classes]: in training the class token's. In evaluation, with a distillation token, the mean of both
      tokens' logits, as DeiT's code has it (section 4 of the paper adds probabilities).
    distillation: [B, classes]: the distillation token's logits, for the teacher to teach.
  """

  def __init__(
    self,
    channels: int,
    size: int,
    classes: int,
    width: int,
    depth: int,
    heads: int,
    *,
    head_width: int | None = None,
    patch: int = 4,
    ratio: float = 4.0,
    distilled: bool = False,
    dtype=None,
    rngs: nnx.Rngs,
  ):
    """Build the layers: kernels Glorot uniform, biases 0, tokens and positions normal with deviation 0.02.

    Args:
      channels: of the images.
      size: height and width of the images.
      classes: number of logits.
      width: of the tokens.
      depth: number of blocks.
      heads: of the attention.
      head_width: None: width / heads.
      patch: height and width of the patches, a divisor of size.
      ratio: width inside the perceptrons, over width.
      distilled: add the distillation token and its head.
      dtype: of the computation and the outputs; parameters are float32, the softmax is computed in it. None: that of
        the input, float32 or wider.
      rngs: stream `params`.

    Raises:
      ValueError: heads or patches that do not divide.
    """
    if head_width is None and width % heads:
      raise ValueError(
        f"heads={heads} must divide width={width}; the nearest: {_divisor(width, heads)}; or give head_width"
      )
    head_width = head_width or width // heads
    if size % patch:
      raise ValueError(
        f"patch={patch} must divide size={size}; the nearest: {_divisor(size, patch)}"
      )

    def linear(inputs, outputs):
      glorot = nnx.initializers.glorot_uniform()
      return nnx.Linear(inputs, outputs, kernel_init=glorot, dtype=dtype, rngs=rngs)

    self.channels, self.size, self.patch, self.deterministic = channels, size, patch, False
    normal, own = nnx.initializers.normal(0.02), 1 + distilled
    self.tokens = nnx.Param(normal(rngs.params(), (own, width), jnp.float32))
    self.positions = nnx.Param(
      normal(rngs.params(), (own + (size // patch) ** 2, width), jnp.float32)
    )
    self.embed = linear(channels * patch**2, width)
    self.blocks = nnx.List(
      _Block(width, heads, head_width, round(ratio * width), linear, dtype, rngs)
      for _ in range(depth)
    )
    self.norm = _norm(width, dtype, rngs)
    self.head = linear(width, classes)
    self.distilled = linear(width, classes) if distilled else None

  def set_view(self, deterministic: bool | None = None):
    """Used by `nnx.view`.

    Args:
      deterministic: evaluation: the logits are the mean of both heads'.
    """
    if deterministic is not None:
      self.deterministic = deterministic

  def __call__(self, x: jax.Array) -> Outputs:
    """Outputs of images [B, size, size, channels]. Raises ValueError for another shape."""
    check_images(x, self.channels)
    if x.shape[1:3] != (self.size, self.size):
      raise ValueError(f"expected images of size={self.size} by {self.size}, got {x.shape}")
    x = self._embedded(x)
    outputs, own = {"embedded": x}, len(self.tokens)
    side = self.size // self.patch
    for k, block in enumerate(self.blocks, 1):
      x, named = block(x)
      outputs |= {f"{name}{k}": value for name, value in named.items()} | {f"block{k}": x}
      outputs[f"map{k}"] = x[:, own:].reshape(x.shape[0], side, side, -1)
    x = self.norm(x[:, :own])
    logits = self.head(x[:, 0])
    if self.distilled is not None:
      outputs["distillation"] = other = self.distilled(x[:, 1])
      logits = (logits + other) / 2 if self.deterministic else logits
    return {**outputs, "embedding": x[:, 0], "logits": logits}

  def _embedded(self, x):
    """Tokens [B, L, width] of images; a linear map of each patch is a convolution whose stride is its size."""
    side, patch = self.size // self.patch, self.patch
    patches = (
      x.reshape(x.shape[0], side, patch, side, patch, -1)
      .swapaxes(2, 3)
      .reshape(x.shape[0], side**2, -1)
    )
    x = self.embed(patches)
    tokens = jnp.broadcast_to(self.tokens[...].astype(x.dtype), (x.shape[0], *self.tokens.shape))
    return jnp.concatenate([tokens, x], 1) + self.positions[...].astype(x.dtype)


class _Block(nnx.Module):
  """Attention and a perceptron with GELU, each on a normalized input and added to it."""

  def __init__(self, width, heads, head_width, inner, linear, dtype, rngs):
    self.head_width = head_width
    self.attention_norm, self.inner_norm = _norm(width, dtype, rngs), _norm(width, dtype, rngs)
    self.query, self.key, self.value = (linear(width, heads * head_width) for _ in range(3))
    self.output = linear(heads * head_width, width)
    self.up, self.down = linear(width, inner), linear(inner, width)

  def __call__(self, x):
    """x [B, L, width] -> the same shape, and what is named."""
    normed = self.attention_norm(x)
    flat = {"queries": self.query(normed), "keys": self.key(normed), "values": self.value(normed)}
    q, k, v = (part.reshape(*x.shape[:2], -1, self.head_width) for part in flat.values())
    wide = jnp.promote_types(x.dtype, jnp.float32)
    scores = jnp.einsum("blhd,bshd->bhls", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    shares = jax.nn.softmax(scores).astype(x.dtype)
    x = x + self.output(jnp.einsum("bhls,bshd->blhd", shares, v).reshape(*x.shape[:2], -1))
    x = x + self.down(jax.nn.gelu(self.up(self.inner_norm(x)), approximate=False))
    return x, {**flat, "attention": scores}


def _norm(width, dtype, rngs) -> nnx.LayerNorm:
  return nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)


def _divisor(whole: int, near: int) -> int:
  return min((d for d in range(1, whole + 1) if whole % d == 0), key=lambda d: abs(d - near))
