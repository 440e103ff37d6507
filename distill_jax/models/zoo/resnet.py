"""Defines residual networks for small images: ResNet (He et al. 2016a) and Wide ResNet.
 Both are the networks of RepDistiller (Tian et al. 2020), to the last parameter. They were designed
for images of 32x32 and take any size: each stage after the first halves the map, rounded up. Source
of Wide ResNet: Zagoruyko & Komodakis 2016.
"""

import jax
from flax import nnx

from distill_jax.models.remat import check_policy, rematerialized
from distill_jax.models.zoo.cnn import check_images
from distill_jax.types import Outputs


class ResNet(nnx.Module):
  """A 3x3 convolution, three stages of residual blocks, the mean over the map and a linear head.

  A block is two 3x3 convolutions with batch norm. The ReLU follows the sum with the shortcut, which
  is a 1x1 convolution with batch norm where size or width change (He et al. 2016a, section 4.2,
  option B).

      resnet20 = ResNet(3, 20, 100, rngs=rngs)
      resnet32x4 = ResNet(3, 32, 100, widths=(32, 64, 128, 256), rngs=rngs)

  Outputs, with k = 1, 2, 3:
    stem: [B, H, W, widths[0]]: after the first convolution, batch norm and ReLU.
    stage{k}_preact: [B, H_k, W_k, widths[k]]: the stage's last sum, before its ReLU.
    stage{k}: the same after the ReLU. stage1 has the image's size, each further one half of the
      last.
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
    """Builds the layers with He initialization by fan-out.

    Args:
      channels: number of channels of the images.
      depth: number of layers, 6 n + 2 for n blocks per stage: 8, 14, 20, 32, 44, 56, 110.
      classes: number of logits.
      widths: channels of the stem and of the three stages; (32, 64, 128, 256) for x4 networks.
      dtype: dtype of the computation and the outputs; parameters and batch statistics are float32.
        None: that of the input, float32 or wider.
      axis_name: mapped axis (`pmap`, `shard_map`) over which batch norm computes its statistics;
        None: each device normalizes by its own rows.
      remat: policy for what a block stores for the backward pass, see `rematerialized`; empty:
        everything.
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
    self.channels = channels
    self.remat = remat
    self.stem = _conv(channels, widths[0], **layers)
    self.norm = _norm(widths[0], **norms)
    self.stages = _stages(_Block, widths, blocks, norms)
    self.head = nnx.Linear(widths[3], classes, **layers)

  def __call__(self, x: jax.Array) -> Outputs:
    """Returns the outputs of images [B, H, W, channels].

    Raises:
      ValueError: images of another shape.
    """
    check_images(x, self.channels)
    x = nnx.relu(self.norm(self.stem(x)))
    outputs = {"stem": x}
    run = rematerialized(_Block.__call__, self.remat)
    for number, stage in enumerate(self.stages, 1):
      for block in stage:
        preact = run(block, x)
        x = nnx.relu(preact)
      outputs |= {f"stage{number}_preact": preact, f"stage{number}": x}
    embedding = x.mean((1, 2))
    return {**outputs, "embedding": embedding, "logits": self.head(embedding)}


class WideResNet(nnx.Module):
  """A wide residual network of pre-activation blocks: batch norm and ReLU precede each convolution.

      wrn_40_2 = WideResNet(3, 40, 2, 100, rngs=rngs)

  A stage's last ReLU is the first one after it: the next stage's, or the one before the mean. It
  follows
  a batch norm, which belongs to that next stage.

  Outputs, with k = 1, 2, 3:
    stem: [B, H, W, 16]: the first convolution, neither normalized nor rectified.
    stage{k}_sum: [B, H_k, W_k, 2^(3+k) width]: the sum that ends the stage, RepDistiller's feature
      k.
    stage{k}_preact: the same after the next batch norm: RepDistiller's with `preact=True`.
    stage{k}: the same after the ReLU. stage1 has the image's size, each further one half of the
      last.
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
    """Builds the layers with He initialization by fan-out.

    Args:
      channels: number of channels of the images.
      depth: number of layers, 6 n + 4 for n blocks per stage: 10, 16, 22, 28, 40.
      width: widening factor k, the multiplier of the stages' 16, 32 and 64 channels (table 1).
      classes: number of logits.
      dtype: dtype of the computation and the outputs; parameters and batch statistics are float32.
        None: that of the input, float32 or wider.
      axis_name: mapped axis (`pmap`, `shard_map`) over which batch norm computes its statistics;
        None: each device normalizes by its own rows.
      remat: policy for what a block stores for the backward pass, see `rematerialized`; empty:
        everything.
      rngs: stream `params`.

    Raises:
      ValueError: a depth that is not 6 n + 4, width < 1, or an unknown policy.
    """
    check_policy(remat)
    blocks = _blocks_per_stage(depth, 4)
    if width < 1:
      raise ValueError(f"width: expected a widening factor >= 1, got {width}")
    layers = {"dtype": dtype, "rngs": rngs}
    norms = {"axis_name": axis_name, **layers}
    widths = (16, 16 * width, 32 * width, 64 * width)
    self.channels = channels
    self.remat = remat
    self.stem = _conv(channels, 16, **layers)
    self.stages = _stages(_PreactBlock, widths, blocks, norms)
    self.norm = _norm(widths[3], **norms)
    self.head = nnx.Linear(widths[3], classes, **layers)

  def __call__(self, x: jax.Array) -> Outputs:
    """Returns the outputs of images [B, H, W, channels].

    Raises:
      ValueError: images of another shape.
    """
    check_images(x, self.channels)
    x = self.stem(x)
    outputs = {"stem": x}
    run = rematerialized(_PreactBlock.__call__, self.remat)
    for number, stage in enumerate(self.stages):
      for index, block in enumerate(stage):
        block_input = x
        preact, x = run(block, block_input)
        if index == 0 and number:
          outputs |= stage_outputs(number, block_input, preact)
    outputs |= stage_outputs(3, x, self.norm(x))
    embedding = outputs["stage3"].mean((1, 2))
    return {**outputs, "embedding": embedding, "logits": self.head(embedding)}


class _Block(nnx.Module):
  """Two convolutions and a shortcut: [B, H, W, inputs] -> [B, H / stride, W / stride, outputs], not
  rectified."""

  def __init__(self, inputs, outputs, stride, *, axis_name, dtype, rngs):
    layers = {"dtype": dtype, "rngs": rngs}
    norms = {"axis_name": axis_name, **layers}
    self.conv1 = _conv(inputs, outputs, stride=stride, **layers)
    self.norm1 = _norm(outputs, **norms)
    self.conv2 = _conv(outputs, outputs, **layers)
    self.norm2 = _norm(outputs, **norms)
    if inputs == outputs and stride == 1:
      self.shortcut = None
    else:
      projection = _conv(inputs, outputs, size=1, stride=stride, **layers)
      self.shortcut = nnx.Sequential(projection, _norm(outputs, **norms))

  def __call__(self, x):
    out = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
    return out + (x if self.shortcut is None else self.shortcut(x))


class _PreactBlock(nnx.Module):
  """A block that returns its input's batch norm [B, H, W, inputs] and [B, H / stride, W / stride,
  outputs]."""

  def __init__(self, inputs, outputs, stride, *, axis_name, dtype, rngs):
    layers = {"dtype": dtype, "rngs": rngs}
    norms = {"axis_name": axis_name, **layers}
    self.norm1 = _norm(inputs, **norms)
    self.conv1 = _conv(inputs, outputs, stride=stride, **layers)
    self.norm2 = _norm(outputs, **norms)
    self.conv2 = _conv(outputs, outputs, **layers)
    # A stage that changes its size also changes its width, so that the width decides on the
    # projection.
    if inputs == outputs:
      self.shortcut = None
    else:
      self.shortcut = _conv(inputs, outputs, size=1, stride=stride, **layers)

  def __call__(self, x):
    preact = self.norm1(x)
    active = nnx.relu(preact)
    out = self.conv2(nnx.relu(self.norm2(self.conv1(active))))
    return preact, out + (x if self.shortcut is None else self.shortcut(active))


def stage_outputs(number: int, x: jax.Array, preact: jax.Array) -> dict[str, jax.Array]:
  """Returns the outputs of a pre-activation network's stage: its sum, that after the next norm, and
  after the ReLU."""
  return {
    f"stage{number}_sum": x,
    f"stage{number}_preact": preact,
    f"stage{number}": nnx.relu(preact),
  }


def _stages(block, widths, blocks: int, options) -> list:
  """Returns three stages, of which the second and the third begin with stride 2."""

  def stage(inputs, outputs, stride):
    first = block(inputs, outputs, stride, **options)
    return [first, *(block(outputs, outputs, 1, **options) for _ in range(blocks - 1))]

  return nnx.data([*map(stage, widths, widths[1:], (1, 2, 2))])


def _conv(inputs, outputs, *, size=3, stride=1, dtype, rngs) -> nnx.Conv:
  """Returns a convolution without bias, padded equally on both sides."""
  # With stride 2, "SAME" would pad one side only.
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
  """Returns n of depth = 6 n + ends."""
  blocks = max(1, round((depth - ends) / 6))
  nearest = 6 * blocks + ends
  if depth != nearest:
    raise ValueError(f"depth: expected 6 n + {ends} with n >= 1, got {depth}; nearest is {nearest}")
  return blocks
