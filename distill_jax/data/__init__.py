"""Holds examples with stable ids, and splits, batches and augments them reproducibly.

Data sets are modules of `data.sets` with a `load()`: `digits` (scikit-learn's), `mni152` (slices of
a brain) and `land_water` (tiles of the Earth) for segmentation, `digit_scenes` (MNIST digits on a
satellite picture) for detection, `tfds` (by name), `folder` (a subfolder per class),
`segmentation_folder` (images and masks) and `coco` (images and boxes); pairs of sequences come from
`libreoffice` (English and French) and `pronunciations` (words and phones). `tfds.images` and
`folder.images` leave images encoded; `stream.Stream` decodes batches of them with the crops of
`crops`. `text` packs documents into rows of tokens, in memory (`text.load`) or from a file that is
mapped into memory (`text.tokenized`, `text.stream`), and pairs for encoder-decoder networks
(`text.pair_source`). `audio` reads sounds; recordings come from `voice_prompts` and
`synthetic_voices`, pictures of words from `rendered_words`, and `text.speech_source` and
`text.line_source` join them with their transcripts.
"""

from distill_jax.errors import naming_extras

with naming_extras():
  from distill_jax.data.arrays import shape_change, to_batch
  from distill_jax.data.augment import augmentation, brightness, flip, rotate90
  from distill_jax.data.batches import batches, eval_batches
  from distill_jax.data.checks import count_rows
  from distill_jax.data.class_weights import class_weights
  from distill_jax.data.combine import concatenate, mix_labels
  from distill_jax.data.entry_crops import center_crop, random_crop, shift_crop
  from distill_jax.data.iterators import from_iterable
  from distill_jax.data.label_checks import (
    UNLABELED,
    check_batch,
    check_labels,
    class_numbers,
    mark_unlabeled,
  )
  from distill_jax.data.mixing import cutmix, mixup
  from distill_jax.data.mosaic import mosaic
  from distill_jax.data.pipeline import Pipeline
  from distill_jax.data.regions import split_regions
  from distill_jax.data.source import Source
  from distill_jax.data.split import label_fraction, leave_out_classes, split, unlabeled

__all__ = [
  "UNLABELED",
  "Pipeline",
  "Source",
  "augmentation",
  "batches",
  "brightness",
  "center_crop",
  "check_batch",
  "check_labels",
  "class_numbers",
  "class_weights",
  "concatenate",
  "count_rows",
  "mark_unlabeled",
  "cutmix",
  "eval_batches",
  "flip",
  "from_iterable",
  "label_fraction",
  "leave_out_classes",
  "mix_labels",
  "mixup",
  "mosaic",
  "random_crop",
  "rotate90",
  "shape_change",
  "shift_crop",
  "split",
  "split_regions",
  "to_batch",
  "unlabeled",
]
