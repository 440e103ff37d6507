"""Makes Models of networks: adapters for what you already have, and small networks of our own.

`from_nnx` and `from_linen` take Flax modules, `from_keras` takes Keras 3 models, `from_equinox` and
`from_haiku` take those of Equinox and Haiku (each package is imported when its name is first used),
and `from_apply` takes functions, hence every other library.

`pretrained` gives any of them weights from a .safetensors or .npz file, and `save_weights` writes
them under the names of another library; `cast` halves the memory of a teacher's weights;
`with_weights` adds them to the outputs; `sliding_window` applies a network to images larger than
its input, and `average_views` averages over clips or crops of an example; `shared_prefix` lets a
student begin with its teacher's first layers, which run once for both; `rematerialized` lets a
block of your own network store less for the backward pass.
"""

import importlib
from typing import Any

from distill_jax.errors import naming_extras

with naming_extras():
  from distill_jax.models.adapters.functions import from_apply
  from distill_jax.models.adapters.linen import from_linen
  from distill_jax.models.adapters.nnx import from_nnx
  from distill_jax.models.cohort import cohort, member
  from distill_jax.models.precision import cast
  from distill_jax.models.remat import rematerialized
  from distill_jax.models.save_weights import save_weights
  from distill_jax.models.shared_prefix import shared_prefix, whole_variables
  from distill_jax.models.views import average_views
  from distill_jax.models.weight_outputs import with_weights
  from distill_jax.models.weights import load_weights, pretrained, torch_kernel
  from distill_jax.models.windows import sliding_window

__all__ = [
  "average_views",
  "cast",
  "cohort",
  "from_apply",
  "from_linen",
  "from_nnx",
  "load_weights",
  "member",
  "pretrained",
  "rematerialized",
  "save_weights",
  "shared_prefix",
  "sliding_window",
  "torch_kernel",
  "whole_variables",
  "with_weights",
]

# Imported on first use, and not by `import *`: their packages are no requirements of training, and
# Keras takes seconds to import.
_LAZY = {
  "from_equinox": "equinox",
  "from_haiku": "haiku",
  "from_keras": "keras",
  "to_keras": "keras",
}


def __getattr__(name: str) -> Any:
  if name in _LAZY:
    adapter = importlib.import_module(f"distill_jax.models.adapters.{_LAZY[name]}")
    return getattr(adapter, name)
  raise AttributeError(f"module 'distill_jax.models' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *_LAZY])
