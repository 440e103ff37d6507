"""Makes Models of networks: adapters for what you already have, and small networks of our own.
 `from_nnx` and `from_linen` take Flax modules, `from_keras` takes Keras 3 models (the extra
`keras`, which is imported when this name is first used), and `from_apply` takes functions, hence
every other library. Haiku's are such functions already:

    net = hk.transform_with_state(lambda image, train: Net()(image, train))
    model = from_apply(
      lambda key, image: net.init(key, image, True),
      lambda params, image, *, state, train, key: net.apply(params, state, key, image, train),
    )
 Equinox modules hold weights and code together and take one example at a time, so separate the two,
and map over the batch:

    template, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    code = eqx.filter(template, eqx.is_inexact_array, inverse=True)
    structure = jax.tree.structure(state)

    def leaves(state):
      return [jnp.asarray(leaf, leaf.dtype) for leaf in jax.tree.leaves(state)]

    def init(key, image):
      net, state = eqx.nn.make_with_state(Net)(key)
      return eqx.filter(net, eqx.is_inexact_array), leaves(state)

    def apply(params, image, *, state, train, key):
      net = eqx.nn.inference_mode(eqx.combine(params, code), not train)
      keys = None if key is None else jax.random.split(key, len(image))
      state = jax.tree.unflatten(structure, state)
      run = jax.vmap(net, in_axes=(0, None, 0), out_axes=(0, None), axis_name="batch")
      outputs, state = run(image, state, keys)
      return outputs, leaves(state)

    model = from_apply(init, apply)
 The state is a list of its leaves because an `eqx.nn.State` may be used only once, and the step
reads the old one again when it skips an update. `asarray` gives the weakly typed counter of batch
norm a dtype, without which a checkpoint cannot store it.
 `pretrained` gives any of them weights from a .safetensors or .npz file; `cast` halves the memory
of a teacher's weights; `with_weights` adds them to the outputs; `rematerialized` lets a block of
your own network store less for the backward pass.
"""

from typing import Any

from distill_jax.errors import naming_extras

with naming_extras():
  from distill_jax.models.adapters.functions import from_apply
  from distill_jax.models.adapters.linen import from_linen
  from distill_jax.models.adapters.nnx import from_nnx
  from distill_jax.models.cohort import cohort, member
  from distill_jax.models.precision import cast
  from distill_jax.models.remat import rematerialized
  from distill_jax.models.weight_outputs import with_weights
  from distill_jax.models.weights import load_weights, pretrained, torch_kernel

__all__ = [
  "cast",
  "cohort",
  "from_apply",
  "from_linen",
  "from_nnx",
  "load_weights",
  "member",
  "pretrained",
  "rematerialized",
  "torch_kernel",
  "with_weights",
]

# Imported on first use, and not by `import *`: Keras is an extra and takes seconds to import.
_KERAS = ("from_keras", "to_keras")


def __getattr__(name: str) -> Any:
  if name in _KERAS:
    from distill_jax.models.adapters import keras

    return getattr(keras, name)
  raise AttributeError(f"module 'distill_jax.models' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *_KERAS])
