"""Masks bands and frames of features on the device (SpecAugment, Park et al. 2019)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from distill_jax.data.checks import check_seed
from distill_jax.errors import check_integer
from distill_jax.types import Batch


def spec_augment(
  *,
  seed: int,
  band_masks: int = 2,
  band_width: int = 8,
  time_masks: int = 2,
  time_width: int = 40,
  time_fraction: float = 0.2,
  entry: str = "features",
  into: str = "",
) -> Callable[[Batch], Batch]:
  """Returns the `augment` of a run that masks bands and frames of features with zeros.

  A mask has a width that is uniform in 0 to the largest one, and a uniform place; masks may
  overlap. Those in time lie within a clip's valid frames, and padding stays as it is. Features are
  not warped. A view is a function of (seed, example id, view), as of `data.augmentation`.

  Args:
    seed: from 0 to 2^32 - 1.
    band_masks, time_masks: numbers of masks.
    band_width: bands of the widest mask; F in the paper.
    time_width: frames of the widest mask; T in the paper.
    time_fraction: largest fraction of a clip's valid frames that a mask hides; p in the paper.
    entry: floats [B, T, F] of mean 0; a batch that has 'frames', int [B], has that many valid
      frames in each row, and T otherwise.
    into: the entry that gets the masked features; empty: `entry`. With another one the teacher, or
      its cache, reads clean features, and `teachers.read_entries(student, {entry: into})` masked
      ones: noisy student (Xie et al. 2020, Park et al. 2020).

  Returns:
    `batch -> batch`. It reads 'id' and 'view', int [B].

  Raises:
    ValueError: a number is out of its range; when called, the batch lacks an entry, or one has
      another shape.

  >>> augment = spec_augment(seed=1, band_masks=1, time_masks=0, into="masked")
  >>> batch = {"features": jnp.ones((2, 5, 8)), "id": jnp.arange(2), "view": jnp.zeros(2, int)}
  >>> augmented = augment(batch)
  >>> [augmented[name].sum((1, 2)).astype(int).tolist() for name in ("features", "masked")]
  [[40, 40], [40, 0]]
  """
  check_seed(seed)
  numbers = dict(band_masks=band_masks, time_masks=time_masks)
  for name, value in (numbers | dict(band_width=band_width, time_width=time_width)).items():
    check_integer(name, value, 0)
  if not 0 <= time_fraction <= 1:
    raise ValueError(f"time_fraction: expected a number in [0, 1], got {time_fraction}")

  def mask_example(features, frames, id, view):
    length, bands = features.shape
    key = jax.random.key(seed, impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, id), view)
    band_key, time_key = jax.random.split(key)
    widest = jnp.minimum(time_width, (time_fraction * frames).astype(jnp.int32))
    is_band = _masked(band_key, band_masks, bands, bands, min(band_width, bands))
    is_frame = _masked(time_key, time_masks, length, frames, widest)
    is_hidden = (is_band[None] | is_frame[:, None]) & (jnp.arange(length) < frames)[:, None]
    return jnp.where(is_hidden, 0, features)

  def augment(batch: Batch) -> Batch:
    features = _checked(batch, entry)
    rows, length, _ = features.shape
    frames = batch.get("frames", jnp.full(rows, length, jnp.int32))
    masked = jax.vmap(mask_example)(features, frames, batch["id"], batch["view"])
    return {**batch, into or entry: masked}

  return augment


def _masked(key: jax.Array, masks: int, size: int, valid, widest) -> jax.Array:
  """Returns which of `size` places are hidden: bool [size], within the first `valid` ones."""
  width_key, start_key = jax.random.split(key)
  fractions = jax.random.uniform(width_key, (masks,))
  widths = jnp.minimum(jnp.floor(fractions * (widest + 1)).astype(jnp.int32), widest)
  starts = jnp.floor(jax.random.uniform(start_key, (masks,)) * (valid - widths + 1))
  places = jnp.arange(size)[:, None]
  starts = jnp.minimum(starts.astype(jnp.int32), valid - widths)
  return ((places >= starts) & (places < starts + widths)).any(1)


def _checked(batch: Batch, entry: str) -> jax.Array:
  for name in (entry, "id", "view"):
    if name not in batch:
      raise ValueError(f"{name}: expected an entry of the batch, got only {sorted(batch)}")
  features = jnp.asarray(batch[entry])
  if features.ndim != 3 or not jnp.issubdtype(features.dtype, jnp.floating):
    raise ValueError(
      f"{entry}: expected floats [B, frames, bands], got {features.dtype} {list(features.shape)}"
    )
  return features
