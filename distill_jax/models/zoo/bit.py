"""Defines BiT (Kolesnikov et al. 2020), with the names of its released weights.
 Its pre-activation bottlenecks (He et al. 2016b) have convolutions with standardized weights (Qiao
et al. 2019) and group norm (Wu & He 2018) instead of batch norm. Without statistics of a batch rows
are independent, devices do not communicate in the forward pass, and a teacher has no state.

    teacher = from_nnx(lambda rngs: BiT(3, 152, 1000, width=2, rngs=rngs))
    example = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)}
    teacher = pretrained(teacher, "BiT-M-R152x2-ILSVRC2012.npz", example, names=released_name)
"""

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax import reduce
from distill_jax.models.remat import check_policy, rematerialized
from distill_jax.models.weights import Origin
from distill_jax.models.zoo.cnn import check_images
from distill_jax.models.zoo.resnet import stage_outputs
from distill_jax.types import Outputs

UNITS = {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
GROUPS = 32


class BiT(nnx.Module):
  """A 7x7 convolution, max pooling, four stages of bottlenecks, the mean over the map and a linear
  head.

  R50x1 is `BiT(3, 50, 1000)`, R152x2 is `BiT(3, 152, 1000, width=2)`. The released networks were
  trained on images in -1..1. For images of 224x224 stage1 has 56x56, and each further stage half as
  many, rounded up.

  Outputs, with k = 1, 2, 3, 4 and W_k = 2^(7+k) width:
    stem: [B, H_1, W_1, 64 width]: the pooled first convolution, neither normalized nor rectified.
    stage{k}_sum: [B, H_k, W_k, W_k]: the sum that ends the stage.
    stage{k}_preact: the same after the next group norm.
    stage{k}: the same after the ReLU.
    embedding: [B, W_4]: the mean of stage4 over the map.
    logits: [B, classes].
  """

  def __init__(
    self,
    channels: int,
    depth: int | tuple[int, int, int, int],
    classes: int,
    *,
    width: float = 1,
    dtype=None,
    remat: str = "",
    rngs: nnx.Rngs,
  ):
    """Builds the layers; the head starts at zero.

    Args:
      channels: number of channels of the images.
      depth: number of layers, 26, 50, 101 or 152; or the number of units in each stage.
      classes: number of logits.
      width: multiplier of the channels, 64 in the narrowest layer; a multiple of 1/2, for 32
        groups.
      dtype: dtype of the convolutions and the outputs. Parameters, statistics of groups and the
        standardization of weights are float32. None: that of the input, float32 or wider.
      remat: policy for what a unit stores for the backward pass, see `rematerialized`; empty:
        everything.
      rngs: stream `params`.

    Raises:
      ValueError: a depth that is neither, a width that does not divide into groups, or an unknown
        policy.
    """
    check_policy(remat)
    units = UNITS.get(depth) if isinstance(depth, int) else tuple(depth)
    if units is None or len(units) != 4 or min(units) < 1:
      raise ValueError(
        f"depth: expected one of {sorted(UNITS)}, or four numbers of units >= 1, got {depth}"
      )
    base = int(64 * width)
    if base != 64 * width or base < GROUPS or base % GROUPS:
      raise ValueError(
        f"width: expected a multiple of {GROUPS / 64}, for {GROUPS} groups of channels, got {width}"
      )
    layers = {"dtype": dtype, "rngs": rngs}
    middles = [base * 2**k for k in range(4)]
    inputs = [base, *(4 * middle for middle in middles)]
    self.channels = channels
    self.remat = remat
    self.stem = _Conv(channels, base, 7, 2, **layers)
    self.stages = nnx.data(
      [
        [
          _Unit(4 * middle if unit else wide, middle, 2 if k and not unit else 1, **layers)
          for unit in range(count)
        ]
        for k, (count, wide, middle) in enumerate(zip(units, inputs, middles))
      ]
    )
    self.norm = _norm(inputs[-1], **layers)
    self.head = nnx.Linear(inputs[-1], classes, kernel_init=nnx.initializers.zeros, **layers)

  def __call__(self, x: jax.Array) -> Outputs:
    """Returns the outputs of images [B, H, W, channels].

    Raises:
      ValueError: images of another shape.
    """
    check_images(x, self.channels)
    # The released networks pad with zeros: "SAME" would pad the maximum with -inf.
    x = jnp.pad(self.stem(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = nnx.max_pool(x, (3, 3), (2, 2))
    outputs = {"stem": x}
    run = rematerialized(_Unit.__call__, self.remat)
    for number, stage in enumerate(self.stages):
      for index, unit in enumerate(stage):
        unit_input = x
        preact, x = run(unit, unit_input)
        if index == 0 and number:
          outputs |= stage_outputs(number, unit_input, preact)
    outputs |= stage_outputs(4, x, self.norm(x))
    embedding = outputs["stage4"].mean((1, 2))
    return {**outputs, "embedding": embedding, "logits": self.head(embedding)}


def released_name(name: str) -> Origin:
  """Returns where a released .npz file has a parameter of a `BiT`: `names=` of `pretrained`.

  The files are BiT-S-R50x1.npz to BiT-M-R152x4-ILSVRC2012.npz, and the teachers and students of
  Beyer et al. 2022 (distill/R152x2_T_224.npz).

  >>> released_name("params/stages/0/2/norm1/scale")
  'resnet/block1/unit03/a/group_norm/gamma'
  """
  parts = name.split("/")[1:]
  layer, leaf = parts[-2:]
  if layer == "head":
    # The released head is a 1x1 convolution.
    kernel = ("resnet/head/conv2d/kernel", lambda kernel: kernel[0, 0])
    return kernel if leaf == "kernel" else "resnet/head/conv2d/bias"
  scope = "resnet"
  if layer == "stem":
    scope += "/root_block"
  elif parts[0] == "stages":
    letter = "a" if layer == "shortcut" else "abc"[int(layer[-1]) - 1]
    scope += f"/block{int(parts[1]) + 1}/unit{int(parts[2]) + 1:02d}/{letter}"
  if leaf == "kernel":
    return f"{scope}{'/proj' if layer == 'shortcut' else ''}/standardized_conv2d/kernel"
  return f"{scope}/group_norm/{'gamma' if leaf == 'scale' else 'beta'}"


class _Unit(nnx.Module):
  """A bottleneck that returns its input's group norm [B, H, W, inputs] and [B, H / stride, W /
  stride, 4 middle]."""

  def __init__(self, inputs, middle, stride, *, dtype, rngs):
    layers = {"dtype": dtype, "rngs": rngs}
    self.norm1 = _norm(inputs, **layers)
    self.conv1 = _Conv(inputs, middle, 1, 1, **layers)
    self.norm2 = _norm(middle, **layers)
    self.conv2 = _Conv(middle, middle, 3, stride, **layers)
    self.norm3 = _norm(middle, **layers)
    self.conv3 = _Conv(middle, 4 * middle, 1, 1, **layers)
    if inputs == 4 * middle and stride == 1:
      self.shortcut = None
    else:
      self.shortcut = _Conv(inputs, 4 * middle, 1, stride, **layers)

  def __call__(self, x):
    preact = self.norm1(x)
    active = nnx.relu(preact)
    out = self.conv2(nnx.relu(self.norm2(self.conv1(active))))
    out = self.conv3(nnx.relu(self.norm3(out)))
    return preact, out + (x if self.shortcut is None else self.shortcut(active))


class _Conv(nnx.Module):
  """A convolution without bias whose filters have mean 0 and variance 1, padded equally on both
  sides."""

  def __init__(self, inputs, outputs, size, stride, *, dtype, rngs):
    shape = (size, size, inputs, outputs)
    self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, jnp.float32))
    self.stride = stride
    self.dtype = dtype

  def __call__(self, x):
    kernel = _standardize(self.kernel[...])
    dtype = self.dtype or reduce.common_dtype(x, kernel)
    side = (kernel.shape[0] // 2,) * 2
    return jax.lax.conv_general_dilated(
      x.astype(dtype),
      kernel.astype(dtype),
      (self.stride, self.stride),
      (side, side),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _standardize(kernel: jax.Array) -> jax.Array:
  kernel = kernel.astype(reduce.common_dtype(kernel.dtype, jnp.float32))
  kernel -= kernel.mean((0, 1, 2), keepdims=True)
  return kernel * jax.lax.rsqrt(jnp.square(kernel).mean((0, 1, 2), keepdims=True) + 1e-10)


def _norm(channels, *, dtype, rngs) -> nnx.GroupNorm:
  # The released weights were trained without the fast variance, E[x^2] - E[x]^2, which rounds
  # differently.
  return nnx.GroupNorm(
    channels, GROUPS, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs
  )
