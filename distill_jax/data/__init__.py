"""Examples with stable ids, their splits, batches that follow from the step, and augmentation.

Data sets are modules with a `load()`, e.g. `from distill_jax.data import digits`: `digits` (embedded), `tfds` (by
name), `folder` (a subfolder per class). `tfds.images` and `folder.images` leave images encoded; `stream.Stream`
makes batches of them with the crops of `crops`. `text` packs documents into rows of tokens;
`tokenized` and `text_stream` do so for text beyond memory.
"""

from distill_jax.data.augment import augmentation, cutmix, flip, mixup, shift_crop
from distill_jax.data.batches import batches, eval_batches
from distill_jax.data.checks import UNLABELED, check_batch, check_labels
from distill_jax.data.source import Source
from distill_jax.data.split import label_fraction, leave_out_classes, split, unlabeled

__all__ = [
  "UNLABELED",
  "Source",
  "augmentation",
  "batches",
  "check_batch",
  "check_labels",
  "cutmix",
  "eval_batches",
  "flip",
  "label_fraction",
  "leave_out_classes",
  "mixup",
  "shift_crop",
  "split",
  "unlabeled",
]
