"""Computes distances between the borders of two regions."""

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage


def hausdorff95(first: np.ndarray, second: np.ndarray, spacing: ArrayLike) -> float:
  """Returns the 95th percentile of the distances from each border voxel of either region to the
  other region's border, both directions together (`medpy.metric.hd95`).

  A border voxel is in the region and has a neighbor along an axis that is not; voxels at the edge
  of the array are border voxels. Distances are between centers of voxels. MONAI takes the larger of
  both directions' percentiles instead, and surface-distance weighs border elements by their area.

  Args:
    first, second: bool, of one shape; none of them empty.
    spacing: size of a voxel along each axis.

  Source: Huttenlocher et al. 1993; the percentile replaces the largest distance.
  """
  # All distances are between voxels of this box: the rest of a volume would only cost time.
  box = ndimage.find_objects((first | second).astype(np.int8))[0]
  borders = [mask ^ ndimage.binary_erosion(mask) for mask in (first[box], second[box])]
  distances = [
    ndimage.distance_transform_edt(~other, sampling=np.asarray(spacing))[border]
    for border, other in (borders, borders[::-1])
  ]
  return float(np.percentile(np.concatenate(distances), 95))
