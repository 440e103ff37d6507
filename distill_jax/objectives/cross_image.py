"""CIRKD as a term: relations among the pixels of a batch and to memories of each class."""

import jax

from distill_jax import losses
from distill_jax.errors import check_integer
from distill_jax.objectives.hyperparameters import Number, at_step, check_number
from distill_jax.objectives.learned import check_pair, learned
from distill_jax.objectives.parts import connector, connector_init, layer, layer_init, resize_to
from distill_jax.objectives.terms import Term
from distill_jax.types import Variables


def cirkd(
  student: str,
  teacher: str,
  num_classes: int,
  *,
  label: str = "label",
  ignore_label: int | None = None,
  pixels: int = 20000,
  regions: int = 2000,
  samples: tuple[int, int] = (4096, 1024),
  pixels_per_class: int = 16,
  temperature: Number = 0.1,
  pixel_weight: Number = 0.1,
  region_weight: Number = 0.1,
) -> Term:
  """Cross-image relational distillation: `losses.cirkd` with a learned head and its memories.

      cirkd("decoder", "decoder", num_classes=19, ignore_label=255)

  The head maps the student's channels to the teacher's for the memories: a 1x1 convolution with
  batch norm, a ReLU and another 1x1 convolution, without biases. The relations among the images of
  a batch need none. A student's map of another size is resized. The memories of teacher's
  directions, `num_classes` x (`pixels` + `regions`) x channels float32 values, are checkpointed;
  a random subset of them, by the step's key, is compared in each step. All pairs of positions in
  the batch are compared as well: choose a map of at most about 32 x 32. Weight 1 next to `labels`
  and `logits(losses.kl_divergence)` per pixel (Yang et al. 2022, arXiv:2204.06986).

  Args:
    student, teacher: names of maps [B, H, W, C] or volumes [B, D, H, W, C].
    num_classes: number of classes, each with memories of its own.
    label: name of the batch's entry of classes of the pixels, integers [B, J, K] of any size.
    ignore_label: a label that ignores its pixel, such as 255; a negative one does as well.
    pixels, regions: size of the memories of each class.
    samples: numbers of pixels and of regions of all classes that a pixel is compared with.
    pixels_per_class: number of pixels of an image and class that enter the memory.
    temperature, pixel_weight, region_weight: of the loss, numbers > 0 and >= 0 or schedules of the
      step.

  Raises:
    ValueError: at once, a number out of range; in init, outputs that are not maps of as many rows;
      in a step, labels that do not fit, or that the batch lacks.

  >>> import jax.numpy as jnp
  >>> from distill_jax import objectives
  >>> maps = {"map": jnp.ones((2, 3, 3, 4))}
  >>> term = objectives.cirkd("map", "map", num_classes=2, pixels=50, regions=5)
  >>> variables = term.init(jax.random.key(0), maps, {"map": jnp.ones((2, 3, 3, 8))})
  >>> variables.state.pixels.shape
  (2, 50, 8)
  """
  sizes = {
    "num_classes": num_classes,
    "pixels": pixels,
    "regions": regions,
    "pixels_per_class": pixels_per_class,
  }
  for name, size in sizes.items():
    check_integer(name, size, 1)
  if not isinstance(samples, tuple) or len(samples) != 2:
    raise ValueError(f"samples: expected (pixels, regions), got {samples!r}")
  for count in samples:
    check_integer("samples", count, 1)

  def check():
    check_number("temperature", temperature, low=0, open_low=True)
    check_number("pixel_weight", pixel_weight, low=0)
    check_number("region_weight", region_weight, low=0)

  check()

  def init(key, s, t):
    check()  # In `fit` also at later steps.
    check_pair(s, t, ranks=(4, 5))
    width = t.shape[-1]
    first_key, last_key, state_key = jax.random.split(key, 3)
    head = {
      "first": connector_init(first_key, s.shape[-1], width),
      "last": layer_init(last_key, width, width, bias=False),
    }
    memory = losses.cirkd_state(state_key, num_classes, width, pixels=pixels, regions=regions)
    return Variables(head, memory)

  def apply(params, state, s, t, *, where, step, key, axis_name, labels):
    s = resize_to(s, t)
    hidden = jax.nn.relu(connector(params["first"], s, where=where, axis_name=axis_name))
    return losses.cirkd(
      s,
      t,
      layer(params["last"], hidden),
      labels,
      key,
      state,
      temperature=at_step(temperature, step),
      pixel_weight=at_step(pixel_weight, step),
      region_weight=at_step(region_weight, step),
      samples=samples,
      pixels_per_class=pixels_per_class,
      ignore_label=ignore_label,
      where=where,
      axis_name=axis_name,
    )

  return learned(student, teacher, init, apply, entries={"labels": label})
