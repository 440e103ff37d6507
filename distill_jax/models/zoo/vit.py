"""Defines vision transformers (Dosovitskiy et al. 2021), with DeiT's distillation token on request.

    student = from_nnx(lambda rngs: ViT(1, 28, 10, 48, 4, 4, distilled=True, rngs=rngs))
    hard = objectives.features("distillation", "logits", losses.hard_distillation, project=False)
    objective = objectives.weighted(labels=(0.5, objectives.labels()), teacher=(0.5, hard))

Source of the token: Touvron et al. 2021.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax import reduce
from distill_jax.models.zoo.cnn import check_images
from distill_jax.types import Outputs


class ViT(nnx.Module):
  """Patches, a class token, blocks of attention and a perceptron, a last norm and a linear head.

  Outputs, with k = 1, 2, ... the block. Of the L tokens the class token comes first, then the
  distillation token if there is one, then the patches row by row:
    embedded: [B, L, embed_dim].
    block{k}: [B, L, embed_dim]: the sum that ends the block.
    map{k}: [B, size / patch, size / patch, embed_dim]: the patches of block{k} as a map.
    queries{k}, keys{k}, values{k}: [B, L, num_heads * head_dim], the heads one after the other.
    attention{k}: [B, num_heads, L, L]: scores before the softmax, float32.
    embedding: [B, embed_dim]: the class token after the last norm.
    logits: [B, classes]: in training the class token's. In evaluation, with a distillation token,
      the mean of both tokens' logits, as in DeiT's code (section 4 of the paper adds
      probabilities).
    distillation: [B, classes]: the distillation token's logits, to compare with the teacher's.
  """

  def __init__(
    self,
    channels: int,
    size: int,
    classes: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    *,
    head_dim: int | None = None,
    patch: int = 4,
    mlp_ratio: float = 4.0,
    distilled: bool = False,
    dtype: Any = None,
    rngs: nnx.Rngs,
  ):
    """Builds the layers.

    Kernels are Glorot uniform, biases 0, and tokens and positions normal with deviation 0.02.

    Args:
      channels: number of channels of the images.
      size: height and width of the images.
      classes: number of logits.
      embed_dim: size of the tokens.
      num_layers: number of blocks.
      num_heads: number of attention heads.
      head_dim: size of a head; None: embed_dim / num_heads.
      patch: height and width of the patches, a divisor of size.
      mlp_ratio: size inside the perceptrons, divided by embed_dim.
      distilled: whether to add the distillation token and its head.
      dtype: dtype of the computation and the outputs. Parameters are float32, and the softmax is
        computed in it. None: that of the input, float32 or wider.
      rngs: stream `params`.

    Raises:
      ValueError: heads or patches that do not divide.
    """
    head_dim = _head_dim(embed_dim, num_heads, head_dim)
    if size % patch:
      nearest = _nearest_divisor(size, patch)
      raise ValueError(f"patch: expected a divisor of size={size}, got {patch}; nearest: {nearest}")

    def linear(inputs, outputs):
      glorot = nnx.initializers.glorot_uniform()
      return nnx.Linear(inputs, outputs, kernel_init=glorot, dtype=dtype, rngs=rngs)

    self.channels = channels
    self.size = size
    self.patch = patch
    self.deterministic = False
    # The order of the layers is that of the random numbers that they start with.
    normal = nnx.initializers.normal(0.02)
    extra = 1 + distilled
    length = extra + (size // patch) ** 2
    self.tokens = nnx.Param(normal(rngs.params(), (extra, embed_dim), jnp.float32))
    self.positions = nnx.Param(normal(rngs.params(), (length, embed_dim), jnp.float32))
    self.embed = linear(channels * patch**2, embed_dim)
    mlp_dim = round(mlp_ratio * embed_dim)
    self.blocks = nnx.data(
      [
        _Block(embed_dim, num_heads, head_dim, mlp_dim, linear, dtype, rngs)
        for _ in range(num_layers)
      ]
    )
    self.norm = _norm(embed_dim, dtype, rngs)
    self.head = linear(embed_dim, classes)
    self.distilled = linear(embed_dim, classes) if distilled else None

  def set_view(self, deterministic: bool | None = None) -> None:
    """Sets the mode for `nnx.view`.

    Args:
      deterministic: whether to evaluate: the logits are the mean of both heads. None: no change.
    """
    if deterministic is not None:
      self.deterministic = deterministic

  def __call__(self, x: jax.Array) -> Outputs:
    """Returns the outputs of images [B, size, size, channels].

    Raises:
      ValueError: images of another shape.
    """
    check_images(x, self.channels)
    if x.shape[1:3] != (self.size, self.size):
      raise ValueError(f"images: expected size={self.size} by {self.size}, got {x.shape}")
    x = self._embed(x)
    outputs = {"embedded": x}
    extra = len(self.tokens)
    side = self.size // self.patch
    for k, block in enumerate(self.blocks, 1):
      x, named = block(x)
      outputs |= {f"{name}{k}": value for name, value in named.items()} | {f"block{k}": x}
      outputs[f"map{k}"] = x[:, extra:].reshape(x.shape[0], side, side, -1)
    x = self.norm(x[:, :extra])
    logits = self.head(x[:, 0])
    if self.distilled is not None:
      outputs["distillation"] = self.distilled(x[:, 1])
      if self.deterministic:
        logits = (logits + outputs["distillation"]) / 2
    return {**outputs, "embedding": x[:, 0], "logits": logits}

  def _embed(self, x):
    """Returns the tokens [B, L, embed_dim] of images."""
    # A linear map of each patch is a convolution whose stride is the size of its window.
    side = self.size // self.patch
    grid = x.reshape(x.shape[0], side, self.patch, side, self.patch, -1)
    patches = grid.swapaxes(2, 3).reshape(x.shape[0], side**2, -1)
    x = self.embed(patches)
    tokens = jnp.broadcast_to(self.tokens[...].astype(x.dtype), (x.shape[0], *self.tokens.shape))
    return jnp.concatenate([tokens, x], 1) + self.positions[...][None].astype(x.dtype)


class _Block(nnx.Module):
  """Attention and a perceptron with GELU, each applied to a normalized input and added to it."""

  def __init__(self, embed_dim, num_heads, head_dim, mlp_dim, linear, dtype, rngs):
    self.head_dim = head_dim
    self.attention_norm = _norm(embed_dim, dtype, rngs)
    self.inner_norm = _norm(embed_dim, dtype, rngs)
    self.query = linear(embed_dim, num_heads * head_dim)
    self.key = linear(embed_dim, num_heads * head_dim)
    self.value = linear(embed_dim, num_heads * head_dim)
    self.output = linear(num_heads * head_dim, embed_dim)
    self.up = linear(embed_dim, mlp_dim)
    self.down = linear(mlp_dim, embed_dim)

  def __call__(self, x):
    """Returns the block's sum, of the shape of x [B, L, embed_dim], and its named outputs."""
    normed = self.attention_norm(x)
    flat = {"queries": self.query(normed), "keys": self.key(normed), "values": self.value(normed)}
    q, k, v = (part.reshape(*x.shape[:2], -1, self.head_dim) for part in flat.values())
    wide = reduce.common_dtype(x.dtype, jnp.float32)
    scores = jnp.einsum("blhd,bshd->bhls", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores).astype(x.dtype)
    x = x + self.output(jnp.einsum("bhls,bshd->blhd", weights, v).reshape(*x.shape[:2], -1))
    x = x + self.down(jax.nn.gelu(self.up(self.inner_norm(x)), approximate=False))
    return x, {**flat, "attention": scores}


def _head_dim(embed_dim: int, num_heads: int, head_dim: int | None) -> int:
  if head_dim is None and embed_dim % num_heads:
    nearest = _nearest_divisor(embed_dim, num_heads)
    raise ValueError(
      f"num_heads: expected a divisor of embed_dim={embed_dim}, got {num_heads}; nearest is "
      f"{nearest}; or give head_dim"
    )
  return head_dim or embed_dim // num_heads


def _norm(embed_dim, dtype, rngs) -> nnx.LayerNorm:
  return nnx.LayerNorm(embed_dim, epsilon=1e-6, dtype=dtype, rngs=rngs)


def _nearest_divisor(number: int, near: int) -> int:
  divisors = [d for d in range(1, number + 1) if number % d == 0]
  return min(divisors, key=lambda divisor: abs(divisor - near))
