"""Writes files as nilearn's: a small NIfTI-1 volume, and an MNI152 template of blocks."""

import gzip
import importlib
import struct

import numpy as np

from distill_jax.data.sets import mni152


def nifti(volume, *, datatype=2, magic=b"n+1\0"):
  """Returns a NIfTI-1 file of uint8."""
  header = bytearray(352)
  struct.pack_into("<i", header, 0, 348)
  struct.pack_into(f"<{1 + volume.ndim}h", header, 40, volume.ndim, *volume.shape)
  struct.pack_into("<h", header, 70, datatype)
  struct.pack_into("<f", header, 108, 352)
  header[344:348] = magic
  return bytes(header) + volume.tobytes(order="F")


def install(folder, monkeypatch):
  """Returns a nilearn whose T1 is the coronal position, gray matter on the left, white above."""
  t1, gray, white = (np.zeros(mni152.SHAPE, np.uint8) for _ in range(3))
  t1[:] = np.arange(mni152.SHAPE[1])[:, None]
  gray[:98, :, :80] = 200
  white[:98, :, 79:150] = 220
  package = folder / "nilearn"
  (package / "datasets" / "data").mkdir(parents=True)
  (package / "__init__.py").write_text("raise RuntimeError('it is not imported')")
  for name, volume in {"t1": t1, "gm": gray, "wm": white}.items():
    path = package / mni152._FILE.format(name)
    path.write_bytes(gzip.compress(nifti(volume), 1))
  monkeypatch.syspath_prepend(folder)
  importlib.invalidate_caches()
  return package
