"""Loads the handwritten digits that come with scikit-learn: a data set without download."""

import numpy as np

from distill_jax.data.source import Source
from distill_jax.data.split import hash_ids, stratified_mask
from distill_jax.errors import install_hint


def load() -> dict[str, Source]:
  """Returns 1,797 images of digits (Alpaydin and Kaynak 1998, UCI), float32 [N, 8, 8, 1] in 0..1.

  Ids are rows of the full set. The set has no test split; here a fixed fifth of each class is the
  test split (359 images), selected by the hash of the id, and the other 1,438 are for training. The
  writers of the images are unknown, so both splits may hold images of one writer.

  Returns:
    `{'train': Source, 'test': Source}`.

  Raises:
    ImportError: scikit-learn is not installed.
  """
  try:
    from sklearn.datasets import load_digits
  except ImportError as error:
    raise ImportError(f"digits needs scikit-learn: {install_hint('sklearn')}") from error
  digits = load_digits()
  ids = np.arange(len(digits.target))
  arrays = {
    "id": ids,
    "image": (digits.images / 16).astype(np.float32)[..., None],
    "label": digits.target,
  }
  full = Source(arrays, classes=10, name="digits")
  is_test = stratified_mask(digits.target, hash_ids(ids, 0, "digits test"), 0.2)
  return {"train": full.take(~is_test), "test": full.take(is_test)}
