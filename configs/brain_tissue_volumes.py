"""Gray and white matter of ONE averaged brain in 3-D: as brain_tissue.py, in volumes of 8 slices.

pip install --no-deps nilearn
python -m distill_jax --config=configs/brain_tissue_volumes.py --seeds=0

Networks are 3-D U-Nets, trained on crops of 8 x 32 x 32 voxels. They segment the held-out slabs of
8 x 160 x 144 by sliding windows. Each slab is a case.
"""

import dataclasses

import numpy as np
from brain_tissue import CLASSES, BrainTissue

from distill_jax import data
from distill_jax.data.sets import mni152
from distill_jax.jobs.config import Splits, Training
from distill_jax.models import from_nnx, sliding_window
from distill_jax.models.zoo.unet import UNet

DEPTH = mni152.HELD_OUT
STRIDE = 6
"""Slices between two training volumes of a slab: 0 to 7, 6 to 13 and 12 to 19."""


@dataclasses.dataclass
class BrainVolumes(BrainTissue):
  """As `BrainTissue`; `window` is the height and width of a crop."""

  methods: tuple[str, ...] = ("kd", "emkd")
  window: int = 32
  teacher_widths: tuple[int, ...] = (8, 16)
  student_widths: tuple[int, ...] = (2, 4)
  teacher_training: Training = dataclasses.field(
    default_factory=lambda: Training(steps=150, batch_size=4, learning_rate=5e-3, weight_decay=1e-3)
  )
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(steps=100, batch_size=4, learning_rate=1e-2, weight_decay=1e-3)
  )

  def data(self) -> Splits:
    return Splits(*map(as_volumes, super().data()))

  def network(self, widths):
    return from_nnx(lambda rngs: UNet(1, widths, CLASSES, spatial_dims=3, rngs=rngs))

  def in_windows(self, model, outputs):
    return sliding_window(model, (DEPTH, self.window, self.window), outputs=outputs)


def as_volumes(source: data.Source) -> data.Source:
  """Returns volumes of neighboring slices, each with the entries of its first one."""
  slabs = source.arrays["slab"]
  starts = [
    np.flatnonzero(slabs == slab)[: -DEPTH + 1 or None : STRIDE] for slab in np.unique(slabs)
  ]
  first = np.concatenate(starts)
  rows = first[:, None] + np.arange(DEPTH)
  arrays = {name: values[first] for name, values in source.arrays.items()}
  volumes = {name: source.arrays[name][rows] for name in ("image", "label")}
  return dataclasses.replace(source, arrays=arrays | volumes)


def get_config():
  return BrainVolumes()
