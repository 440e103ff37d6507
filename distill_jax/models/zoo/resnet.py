"""Residual networks for small images: ResNet (He et al. 2016a) and Wide ResNet (Zagoruyko & Komodakis 2016).

Both are the networks of RepDistiller (Tian et al. 2020), to the last parameter. Images may have any size: each
stage after the first halves the map, rounded up, and 32x32 is what they were designed for.
"""

import jax
from flax import nnx

from distill_jax.models.remat import check_policy, rematerialized
from distill_jax.models.zoo.cnn import check_images
from distill_jax.types import Outputs


class ResNet(nnx.Module):
  """A 3x3 convolution, three stages of residual blocks, the mean over the map, a linear head.

  A block is two 3x3 convolutions with batch norm; the ReLU follows the sum with the shortcut, which is a 1x1
  convolution with batch norm where size or width change (He et al. 2016a, section 4.2 with option B).

      resnet20 = ResNet(3, 20, 100, rngs=rngs)
      resnet32x4 = ResNet(3, 32, 100, widths=(32, 64, 128, 256), rngs=rngs)

  Outputs, with k = 1, 2, 3:
    stem: [B, H, W, widths[0]]: after the first convolution, batch norm and ReLU.
    stage{k}_preact: [B, H_k, W_k, widths[k]]: the stage's last sum, before its ReLU.
    stage{k}: the same after the ReLU. stage1 has the image's size, each further one half of the last.
    embedding: [B, widths[3]]: the mean of stage3 over the map.
    logits: [B, classes].
  """

  def __init__(
    self,
    channels: int,
    depth: int,
    classes: int,
    *,
    widths: tuple[int, int, int, int] = (16, 16, 32, 64),
    dtype=None,
    axis_name=None,
    remat: str = "",
    rngs: nnx.Rngs,
  ):
    """Build the layers with He initialization by fan-out.

    Args:
      channels: of the images.
      depth: 6 n + 2 for n blocks per stage: 8, 14, 20, 32, 44, 56, 110.
      classes: number of logits.
      widths: channels of the stem and of the three stages; (32, 64, 128, 256) for the x4 networks.
      dtype: of the computation and the outputs; parameters and batch statistics are float32. None: that of
        the input, float32 or wider.
      axis_name: mapped axis (`pmap`, `shard_map`) over which batch norm takes its statistics.
      remat: what a block keeps for the backward pass, see `rematerialized`; empty: all that it needs.
      rngs: stream `params`.

    Raises:
      ValueError: a depth that is not 6 n + 2, not four widths from 1, or an unknown policy.
    """
    check_policy(remat)
    blocks = _blocks_per_stage(depth, 2)
    if len(widths) != 4 or min(widths) < 1:
      raise ValueError(
        f"widths: expected four numbers >= 1 (stem and three stages), got {tuple(widths)}"
      )
    layers = {"dtype": dtype, "rngs": rngs}
    norms = {"axis_name": axis_name, **layers}
    self.channels, self.remat = channels, remat
    self.stem = _conv(channels, widths[0], **layers)
    self.norm = _norm(widths[0], **norms)
    self.stages = _stages(_Block, widths, blocks, norms)
    self.head = nnx.Linear(widths[3], classes, **layers)

  def __call__(self, x: jax.Array) -> Outputs:
    """Outputs of images [B, H, W, C]. Raises ValueError for another shape."""
    check_images(x, self.channels)
    outputs = {"stem": nnx.relu(self.norm(self.stem(x)))}
    x = outputs["stem"]
    run = rematerialized(_Block.__call__, self.remat)
    for number, stage in enumerate(self.stages, 1):
      for block in stage:
        preact = run(block, x)
        x = nnx.relu(preact)
      outputs |= {f"stage{number}_preact": preact, f"stage{number}": x}
    embedding = x.mean((1, 2))
    return {**outputs, "embedding": embedding, "logits": self.head(embedding)}


class WideResNet(nnx.Module):
  """Wide residual network: pre-activation blocks, batch norm and ReLU coming before each convolution.

      wrn_40_2 = WideResNet(3, 40, 2, 100, rngs=rngs)

  A stage's last ReLU is the first one after it: the next stage's, or the one before the mean. It follows a
  batch norm, which belongs to that next stage.

  Outputs, with k = 1, 2, 3:
    stem: [B, H, W, 16]: the first convolution, neither normalized nor rectified.
    stage{k}_sum: [B, H_k, W_k, 2^(3+k) width]: the sum that ends the stage, RepDistiller's feature k.
    stage{k}_preact: the same after the next batch norm: RepDistiller's with `preact=True`.
    stage{k}: the same after the ReLU. stage1 has the image's size, each further one half of the last.
    embedding: [B, 64 width]: the mean of stage3 over the map.
    logits: [B, classes].
  """

  def __init__(
    self,
    channels: int,
    depth: int,
    width: int,
    classes: int,
    *,
    dtype=None,
    axis_name=None,
    remat: str = "",
    rngs: nnx.Rngs,
  ):
    """Build the layers with He initialization by fan-out.

    Args:
      channels: of the images.
      depth: 6 n + 4 for n blocks per stage: 10, 16, 22, 28, 40.
      width: widening factor k, multiplies the 16, 32 and 64 channels of the stages (table 1).
      classes: number of logits.
      dtype: of the computation and the outputs; parameters and batch statistics are float32. None: that of
        the input, float32 or wider.
      axis_name: mapped axis (`pmap`, `shard_map`) over which batch norm takes its statistics.
      remat: what a block keeps for the backward pass, see `rematerialized`; empty: all that it needs.
      rngs: stream `params`.

    Raises:
      ValueError: a depth that is not 6 n + 4, width < 1, or an unknown policy.
    """
    check_policy(remat)
    blocks = _blocks_per_stage(depth, 4)
    if width < 1:
      raise ValueError(f"width={width}: expected a widening factor >= 1")
    layers = {"dtype": dtype, "rngs": rngs}
    norms = {"axis_name": axis_name, **layers}
    widths = (16, 16 * width, 32 * width, 64 * width)
    self.channels, self.remat = channels, remat
    self.stem = _conv(channels, 16, **layers)
    self.stages = _stages(_PreactBlock, widths, blocks, norms)
    self.norm = _norm(widths[3], **norms)
    self.head = nnx.Linear(widths[3], classes, **layers)

  def __call__(self, x: jax.Array) -> Outputs:
    """Outputs of images [B, H, W, C]. Raises ValueError for another shape."""
    check_images(x, self.channels)
    x = self.stem(x)
    outputs = {"stem": x}
    run = rematerialized(_PreactBlock.__call__, self.remat)
    for number, stage in enumerate(self.stages):
      for index, block in enumerate(stage):
        before, (preact, x) = x, run(block, x)
        if index == 0 and number:
          outputs |= _ends(number, before, preact)
    outputs |= _ends(3, x, self.norm(x))
    embedding = outputs["stage3"].mean((1, 2))
    return {**outputs, "embedding": embedding, "logits": self.head(embedding)}


class _Block(nnx.Module):
  """[B, H, W, inputs] -> the sum [B, H / stride, W / stride, outputs] before the block's last ReLU."""

  def __init__(self, inputs, outputs, stride, *, axis_name, dtype, rngs):
    layers = {"dtype": dtype, "rngs": rngs}
    norms = {"axis_name": axis_name, **layers}
    self.conv1, self.norm1 = (
      _conv(inputs, outputs, stride=stride, **layers),
      _norm(outputs, **norms),
    )
    self.conv2, self.norm2 = _conv(outputs, outputs, **layers), _norm(outputs, **norms)
    self.shortcut = (
      None
      if inputs == outputs and stride == 1
      else nnx.Sequential(
        _conv(inputs, outputs, size=1, stride=stride, **layers), _norm(outputs, **norms)
      )
    )

  def __call__(self, x):
    out = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
    return out + (x if self.shortcut is None else self.shortcut(x))


class _PreactBlock(nnx.Module):
  """[B, H, W, inputs] -> its batch norm, of the same shape, and [B, H / stride, W / stride, outputs]."""

  def __init__(self, inputs, outputs, stride, *, axis_name, dtype, rngs):
    layers = {"dtype": dtype, "rngs": rngs}
    norms = {"axis_name": axis_name, **layers}
    self.norm1, self.conv1 = _norm(inputs, **norms), _conv(inputs, outputs, stride=stride, **layers)
    self.norm2, self.conv2 = _norm(outputs, **norms), _conv(outputs, outputs, **layers)
    # Without a change of width there is no projection; no stage changes its size alone.
    self.shortcut = (
      None if inputs == outputs else _conv(inputs, outputs, size=1, stride=stride, **layers)
    )

  def __call__(self, x):
    preact = self.norm1(x)
    active = nnx.relu(preact)
    out = self.conv2(nnx.relu(self.norm2(self.conv1(active))))
    return preact, out + (x if self.shortcut is None else self.shortcut(active))


def _ends(number, x, preact) -> dict[str, jax.Array]:
  return {
    f"stage{number}_sum": x,
    f"stage{number}_preact": preact,
    f"stage{number}": nnx.relu(preact),
  }


def _stages(block, widths, blocks: int, options) -> nnx.List:
  """Three stages; the second and the third begin with stride 2."""

  def stage(inputs, outputs, stride):
    first = block(inputs, outputs, stride, **options)
    return nnx.List([first, *(block(outputs, outputs, 1, **options) for _ in range(blocks - 1))])

  return nnx.List(map(stage, widths, widths[1:], (1, 2, 2)))


def _conv(inputs, outputs, *, size=3, stride=1, dtype, rngs) -> nnx.Conv:
  """A convolution without bias, padded alike on both sides: with stride 2, "SAME" would pad one side alone."""
  he = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
  side = (size // 2, size // 2)
  return nnx.Conv(
    inputs,
    outputs,
    (size, size),
    stride,
    padding=(side, side),
    use_bias=False,
    kernel_init=he,
    dtype=dtype,
    rngs=rngs,
  )


def _norm(channels, *, axis_name, dtype, rngs) -> nnx.BatchNorm:
  return nnx.BatchNorm(channels, momentum=0.9, dtype=dtype, axis_name=axis_name, rngs=rngs)


def _blocks_per_stage(depth: int, ends: int) -> int:
  """n of depth = 6 n + ends."""
  blocks = max(1, round((depth - ends) / 6))
  if depth != 6 * blocks + ends:
    raise ValueError(
      f"depth={depth}: expected 6 n + {ends} with n >= 1; the nearest is {6 * blocks + ends}"
    )
  return blocks
