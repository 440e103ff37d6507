"""ImageNet, "a good teacher is patient and consistent": a BiT ResNet-152x2 teaches a ResNet-50.

python -m distill_jax --config=configs/imagenet_patient.py --stages=student,report \
    --config.teacher_weights=R152x2_T_224.npz --config.data_dir=gs://bucket/tensorflow_datasets

Function matching (Beyer et al. 2022): teacher and student see the same picture, a random crop,
mirrored or not, mixed with another one in any proportion. The student minimizes the divergence from
the teacher's probabilities at temperature 1, and sees no label. 1,200 epochs of batches of 4,096.
Optimizer, schedule, augmentation and networks are those of the authors' config (big_vision,
configs/proj/distill/bit_i1k.py). Two things differ: the convolutions compute in bfloat16, also
between layers, and a hash of the id holds out 2 % of the training images to choose the best
weights.

The teacher's weights are those that the authors released,
storage.googleapis.com/bit_models/distill/R152x2_T_224.npz, 83.0 % top-1 at 224 x 224; a file like
BiT-M-R152x2-ILSVRC2012.npz fits as well. Without `teacher_weights` a teacher is trained here first,
only on ImageNet, which the authors do not do. Their best ResNet-50 reaches 82.8 %. ImageNet is
TFDS's `imagenet2012`, prepared as ArrayRecord.

The cost of a step, without a TPU (`pip install '.[tpu]'`; 3 to 6 minutes on two cores, 7
GB of memory):

python -m distill_jax --config=configs/imagenet_patient.py --compile_for=v5e:16x16

Never run on a TPU. Compiled by libtpu 0.0.42 (FLOPs of a chip, and over those of teacher forward +
student forward and backward, compiled separately; a step all-reduces 51,098,708 bytes, the
gradients in bfloat16 and the loss):

             images a chip   memory of a chip        FLOPs             a step at least   all steps
    v5e:4x4            256   9.83 of 15.75 GiB   2.883e13                    146 ms     14.9 hours
    v5e:16x16           16   1.93 of 15.75 GiB   1.806e12  1.0010 x         9.17 ms     0.93 hours
    v5p:8x8x8            8   1.70 of 95.74 GiB   9.044e11  1.0017 x         1.97 ms     0.20 hours
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from distill_jax import data, losses, objectives
from distill_jax.data.crops import center_crop, random_resized_crop
from distill_jax.data.sets import tfds
from distill_jax.errors import suggest
from distill_jax.jobs.config import Config, ConfigError, Crops, Splits, Training, check
from distill_jax.models import from_nnx, pretrained
from distill_jax.models.remat import POLICIES
from distill_jax.models.zoo.bit import BiT, released_name
from distill_jax.trees import named_leaves

CLASSES = 1000
# The fraction of the training images that the authors hold out for tuning.
HELD_OUT = 0.02
# Steps.
EPOCH = int(1_281_167 * (1 - HELD_OUT)) // 4096


@dataclasses.dataclass
class Patient(Training):
  """AdamW with clipped gradients and weight decay only of kernels.

  Attributes:
    clip: largest global norm of the gradients.
  """

  steps: int = 1200 * EPOCH
  batch_size: int = 4096
  learning_rate: float = 0.03
  warmup_steps: int = 5000
  # Times the rate it is the authors' 3e-4, which they multiply only by the schedule.
  weight_decay: float = 0.01
  clip: float = 1.0

  def optimizer(self) -> optax.GradientTransformation:
    decay = {"weight_decay": self.weight_decay, "mask": _kernels}
    adam = optax.adamw(self.schedule(), mu_dtype=jnp.bfloat16, **decay)
    return optax.chain(optax.clip_by_global_norm(self.clip), adam)

  def validate(self) -> None:
    super().validate()
    check(self, "clip", above=0)


@dataclasses.dataclass
class ImagenetPatient(Config):
  """See `Config` for the fields that all jobs have.

  Attributes:
    teacher_weights: .npz file with released weights of the teacher; empty: it is trained here.
    teacher_depth, teacher_width, student_depth, student_width: layers and width multiplier of the
      networks: 152 and 2 for ResNet-152x2.
    size: height and width of the images.
    temperature: temperature of both networks' probabilities.
    dtype: dtype of the computation, 'bfloat16' or 'float32'; weights are float32.
    remat: what a unit of the student stores for the backward pass: '' all that it needs,
      'dots_saveable' its convolutions, 'nothing_saveable' only its input (`models.remat`).
    data_dir: folder of TFDS's prepared data sets; empty: its default.
    source_files: folder with the archives of imagenet2012, from which TFDS prepares the set once.
  """

  teacher_weights: str = ""
  teacher_depth: int = 152
  teacher_width: float = 2
  student_depth: int = 50
  student_width: float = 1
  size: int = 224
  temperature: float = 1.0
  dtype: str = "bfloat16"
  remat: str = ""
  data_dir: str = ""
  source_files: str = ""
  checkpoint_every: int = 1000
  teacher_training: Patient = dataclasses.field(default_factory=lambda: Patient(steps=90 * EPOCH))
  student_training: Patient = dataclasses.field(default_factory=Patient)

  def data(self) -> Splits:
    sets = tfds.images(
      "imagenet2012",
      splits=("train", "validation"),
      data_dir=self.data_dir or None,
      source_files=self.source_files or None,
    )
    train, validation = data.split(sets["train"], HELD_OUT)
    return Splits(train, validation, sets["validation"])

  def crops(self) -> Crops:
    return Crops(random_resized_crop(self.size, seed=0, area=(0.05, 1.0)), center_crop(self.size))

  def abstract_batch(self, rows: int):
    """Returns the shapes of a batch, which do not depend on the data."""
    number = jax.ShapeDtypeStruct((rows,), jnp.int32)
    image = jax.ShapeDtypeStruct((rows, self.size, self.size, 3), jnp.float32)
    return {"id": number, "view": number, "label": number, "image": image}

  def teacher(self):
    teacher = self._network(self.teacher_depth, self.teacher_width)
    if not self.teacher_weights:
      return teacher
    return pretrained(teacher, self.teacher_weights, self.abstract_batch(1), names=released_name)

  def student(self):
    return self._network(self.student_depth, self.student_width, self.remat)

  def objective(self):
    soft = objectives.logits(losses.kl_divergence, temperature=self.temperature)
    return objectives.weighted(soft=(1.0, soft))

  def augment(self):
    return data.augmentation(data.flip(), seed=0)

  def mix(self):
    return data.mixup(1.0, CLASSES)

  def validate(self) -> None:
    super().validate()
    check(self, "size", least=32)
    check(self, "temperature", above=0)
    if self.dtype not in ("bfloat16", "float32"):
      raise ConfigError(f"dtype: expected 'bfloat16' or 'float32', got {self.dtype!r}")
    if self.remat not in ("", *POLICIES):
      raise ConfigError(
        f"remat: expected a policy, got {self.remat!r}{suggest(self.remat, POLICIES)}"
      )

  def _network(self, depth: int, width: float, remat: str = ""):
    def call(net, image, *, train):
      # The released networks take pixels in -1..1; `data` gives 0..1.
      return net(2 * image - 1)

    dtype = jnp.dtype(self.dtype)

    def make(rngs):
      return BiT(3, depth, CLASSES, width=width, dtype=dtype, remat=remat, rngs=rngs)

    return from_nnx(make, call=call)


def _kernels(params):
  names = [name for name, _ in named_leaves(params)]
  return jax.tree.unflatten(jax.tree.structure(params), [name.endswith("kernel") for name in names])


def get_config():
  return ImagenetPatient()
