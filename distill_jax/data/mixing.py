"""Mixes the rows of a batch: functions of (step key, batch), for live teachers only.

Batches are shuffled, so the row before is a random partner, and needs no gather across devices.
Under `pmap` or `shard_map` each device pairs its local rows.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from distill_jax import reduce
from distill_jax.data.augmented_entries import Entries, make_entries
from distill_jax.errors import check_integer
from distill_jax.types import Batch

Mixer = Callable[[jax.Array, Batch], Batch]
BLENDED = ("image",)
PASTED = ("image", "label_map")
NOT_LABELS = ("id", "view", "where")
Classes = int | Mapping[str, int | None] | None


def mixup(
  alpha: float,
  classes: Classes,
  *,
  entries: Sequence[str] | Mapping[str, str] | None = None,
) -> Mixer:
  """Blends each image, and its label, with the one before it in the batch (Zhang et al. 2018).

  One weight from Beta(alpha, alpha) per batch, as in the authors' code.

  Args:
    alpha: parameter of the Beta distribution, > 0; the paper uses 0.1 to 0.4 on ImageNet, 1 on
      CIFAR.
    classes: number of classes of 'label'; or of each entry with labels, `{"label": 10, "type": 3}`,
      None for floats such as regression targets, which are blended as they are. None: 'label' is
      floats, or missing.
    entries: names of the images, or of vectors, which are blended with one weight; None: 'image',
      and a batch with other images raises. Label maps, boxes and points cannot be blended.

  Returns:
    `(key, batch) -> batch`: images blended, labels rows of probabilities [rows, classes]. An
    example without a label (negative, or a row of zeros) adds no mass to it, so a row may sum to
    less than 1. All other entries stay. Rows that 'where' leaves out are no partner of any row.

  Raises:
    ValueError: an argument is outside its range; when called, there are cached teacher outputs in
      the batch, an entry is missing or of another shape, labels do not fit `classes`, or integers
      or bools [rows] are not among `classes`.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> from distill_jax import data
  >>> batch = {"image": jnp.ones((2, 4, 4, 1)), "label": jnp.array([0, 1])}
  >>> blended = data.mixup(1.0, classes=2)(jax.random.key(0), batch)
  >>> blended["label"].shape  # probabilities
  (2, 2)
  """
  _check_alpha(alpha)
  label_classes = _label_classes(classes)
  targets = make_entries(entries)
  _check_kinds(targets, "mixup", BLENDED)

  def mix(key, batch):
    targets.check(batch, any_shape=True, allowed=BLENDED)
    _check_labels_named(batch, targets, label_classes)
    pairs = _pairs(batch, targets, label_classes)
    weight = jax.random.beta(key, alpha, alpha, dtype=jnp.float32)
    return {**batch, **{name: _blend(weight, *pair) for name, pair in pairs.items()}}

  return mix


def cutmix(
  alpha: float,
  classes: Classes,
  *,
  entries: Sequence[str] | Mapping[str, str] | None = None,
) -> Mixer:
  """Pastes a rectangle of the image before it in the batch over each image (Yun et al. 2019).

  One weight w from Beta(alpha, alpha) and one rectangle per batch, as in the authors' code: sides
  sqrt(1 - w) of the image's, center uniform, clipped at the border; labels are weighted by the
  covered area after clipping (section 3.1, equation 2).

  Args:
    alpha: parameter of the Beta distribution, > 0; the paper uses 1.
    classes: as of `mixup`.
    entries: names of images, or name -> 'image' or 'label_map', which are pasted alike; sizes are
      multiples of the first one's. Boxes cannot be pasted. None: as of `mixup`.

  Returns:
    `(key, batch) -> batch` as of `mixup`, with pasted instead of blended images.

  Raises:
    ValueError: as `mixup`.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> from distill_jax import data
  >>> batch = {"image": jnp.ones((2, 4, 4, 1)), "label": jnp.array([0, 1])}
  >>> pasted = data.cutmix(1.0, classes=2)(jax.random.key(0), batch)
  >>> pasted["label"].shape  # probabilities
  (2, 2)
  """
  _check_alpha(alpha)
  targets = make_entries(entries)
  label_classes = _label_classes(classes)
  _check_kinds(targets, "cutmix", PASTED)

  def mix(key, batch):
    targets.check(batch, allowed=PASTED)
    _check_labels_named(batch, targets, label_classes)
    height, width = targets.size(batch)
    pasted = _rectangle(key, alpha, height, width)
    weight = 1 - pasted.mean(dtype=jnp.float32)
    mixed = {}
    for name, pair in _pairs(batch, targets, label_classes).items():
      if name in targets.kinds:
        mixed[name] = _paste(name, pasted, *pair)
      else:
        mixed[name] = _blend(weight, *pair)
    return {**batch, **mixed}

  return mix


def _rectangle(key: jax.Array, alpha: float, height: int, width: int) -> jax.Array:
  """Returns the mask of a random rectangle, bool [height, width], True inside."""
  weight_key, center_key = jax.random.split(key)
  side = jnp.sqrt(1 - jax.random.beta(weight_key, alpha, alpha, dtype=jnp.float32))

  def inside(key, size):
    half = (size * side).astype(jnp.int32) // 2
    center = jax.random.randint(key, (), 0, size, jnp.int32)
    position = jnp.arange(size, dtype=jnp.int32)
    return (center - half <= position) & (position < center + half)

  row_key, column_key = jax.random.split(center_key)
  return inside(row_key, height)[:, None] & inside(column_key, width)[None]


def _blend(weight: jax.Array, values: jax.Array, partner: jax.Array) -> jax.Array:
  dtype = reduce.common_dtype(values.dtype, jnp.float32)
  weight = weight.astype(dtype)
  mixed = weight * values.astype(dtype) + (1 - weight) * partner.astype(dtype)
  return mixed.astype(values.dtype)


def _paste(name: str, pasted: jax.Array, values: jax.Array, partner: jax.Array) -> jax.Array:
  scale = values.shape[1] // len(pasted)
  mask = jnp.repeat(jnp.repeat(pasted, scale, 0), scale, 1)
  if mask.shape != values.shape[1:3]:
    raise ValueError(
      f"{name}: expected a multiple of the first entry's size {pasted.shape}, got "
      f"{values.shape[1:3]}: name the smallest image first"
    )
  return jnp.where(mask.reshape(mask.shape + (1,) * (values.ndim - 3)), partner, values)


def _pairs(
  batch: Batch, targets: Entries, classes: Mapping[str, int | None]
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Returns the entries to mix, labels as floats, each with its rows' partners."""
  cached = sorted(name for name in batch if name.startswith("teacher/"))
  if cached:
    raise ValueError(
      f"{cached[0]}: expected no cached teacher output, each mixed image is new: use a live teacher"
    )
  values = {name: jnp.asarray(batch[name]) for name in targets.kinds}
  for name, size in classes.items():
    if name in values:
      continue
    if name in batch:
      values[name] = _float_labels(name, batch[name], size)
    elif size is not None:
      raise ValueError(f"{name}: expected an entry of the batch, got only {sorted(batch)}")
  rows = len(next(iter(values.values())))
  has_partner = jnp.roll(batch["where"], 1) if "where" in batch else jnp.ones(rows, bool)

  def partner(rows):
    mask = has_partner.reshape((-1,) + (1,) * (rows.ndim - 1))
    return jnp.where(mask, jnp.roll(rows, 1, axis=0), rows)

  return {name: (x, partner(x)) for name, x in values.items()}


def _float_labels(name: str, labels: jax.Array, classes: int | None) -> jax.Array:
  """Returns floats as they are, or probabilities [rows, classes] with zeros for no label."""
  labels = jnp.asarray(labels)
  is_float = jnp.issubdtype(labels.dtype, jnp.floating)
  if classes is None:
    if not is_float:
      hint = f'give classes, e.g. classes={{"{name}": 10}}'
      if labels.ndim > 2:
        hint = "labels of pixels cannot be blended; cutmix pastes them as a label_map"
      raise ValueError(
        f"{name}: expected floats without a number of classes, got {labels.dtype} "
        f"{list(labels.shape)}: {hint}"
      )
    return labels
  if labels.ndim == 1 and not is_float:
    # A negative label gives a row of zeros.
    return jax.nn.one_hot(labels.astype(jnp.int32), classes, dtype=jnp.float32)
  if is_float and labels.ndim == 2 and labels.shape[1] == classes:
    return labels
  expected = f"integers [rows] or probabilities [rows, {classes}]"
  raise ValueError(f"{name}: expected {expected}, got {labels.dtype} {list(labels.shape)}")


def _check_labels_named(batch: Batch, targets: Entries, classes: Mapping[str, int | None]) -> None:
  """Checks that no other entry seems to hold labels, which would stay those of one image."""
  for name, values in batch.items():
    is_label = jnp.shape(values)[1:] in ((), (1,)) and not jnp.issubdtype(
      values.dtype, jnp.floating
    )
    if not is_label or name.startswith("teacher/"):
      continue
    if name not in (*NOT_LABELS, *targets.kinds, *classes):
      sizes = {**{key: size for key, size in classes.items() if key in batch}, name: 3}
      raise ValueError(
        f"classes: expected the number of classes of each entry with labels, got none of {name!r} "
        f"{values.dtype} {list(values.shape)}: write classes={sizes} with its own number, or leave "
        "the entry out of the batch"
      )


def _label_classes(classes: Classes) -> dict[str, int | None]:
  """Returns the number of classes of each entry with labels."""
  by_entry = dict(classes) if isinstance(classes, Mapping) else {"label": classes}
  for size in by_entry.values():
    if size is not None:
      check_integer("classes", size, 1)
  return by_entry


def _check_alpha(alpha: float) -> None:
  if not 0 < alpha < float("inf"):
    raise ValueError(f"alpha: expected a finite number > 0, got {alpha}")


def _check_kinds(targets: Entries, function: str, kinds: tuple[str, ...]) -> None:
  for name, kind in targets.kinds.items():
    if kind not in kinds:
      raise ValueError(
        f"entries: expected kinds among {kinds} for {function}, got {kind!r} of {name!r}, which "
        "cannot be mixed: leave it out, or do not mix"
      )
