"""Networks as Models: adapters for what you already have, and small networks of our own.

`from_nnx` and `from_linen` take Flax modules, `from_keras` takes Keras 3 models (the extra `keras`; it is imported
when this name is first used), and `from_apply` takes functions, hence every other library. Haiku's are such
functions already:

    net = hk.transform_with_state(lambda image, train: Net()(image, train))
    model = from_apply(
      lambda key, image: net.init(key, image, True),
      lambda params, image, *, state, train, key: net.apply(params, state, key, image, train),
    )

Equinox modules hold weights and code together and see one example at a time, so they are taken apart, and mapped
over the batch:

    made, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    code, structure = eqx.filter(made, eqx.is_inexact_array, inverse=True), jax.tree.structure(state)

    def leaves(state):
      return [jnp.asarray(leaf, leaf.dtype) for leaf in jax.tree.leaves(state)]

    def init(key, image):
      made, state = eqx.nn.make_with_state(Net)(key)
      return eqx.filter(made, eqx.is_inexact_array), leaves(state)

    def apply(params, image, *, state, train, key):
      net = eqx.nn.inference_mode(eqx.combine(params, code), not train)
      keys = None if key is None else jax.random.split(key, len(image))
      state = jax.tree.unflatten(structure, state)
      run = jax.vmap(net, in_axes=(0, None, 0), out_axes=(0, None), axis_name="batch")
      outputs, state = run(image, state, keys)
      return outputs, leaves(state)

    model = from_apply(init, apply)

The state travels as its leaves because an `eqx.nn.State` may be used only once, and the step looks at the old one
again when it skips an update; `asarray` makes the weakly typed counter of batch norm a plain one, which a checkpoint
can hold.

`pretrained` gives any of them weights from a .safetensors or .npz file; `cast` halves the memory that a teacher's
weights take; `with_weights` puts them among the outputs; `rematerialized` lets a block of your own network keep less
for the backward pass.
"""

from distill_jax.models.adapters.functions import from_apply
from distill_jax.models.adapters.linen import from_linen
from distill_jax.models.adapters.nnx import from_nnx
from distill_jax.models.cohort import cohort, member
from distill_jax.models.own_weights import with_weights
from distill_jax.models.precision import cast
from distill_jax.models.remat import rematerialized
from distill_jax.models.weights import load_weights, pretrained, torch_kernel

__all__ = [
  "cast",
  "cohort",
  "from_apply",
  "from_keras",
  "from_linen",
  "from_nnx",
  "load_weights",
  "member",
  "pretrained",
  "rematerialized",
  "to_keras",
  "torch_kernel",
  "with_weights",
]


def __getattr__(name):
  if name in ("from_keras", "to_keras"):  # lazy: only those who have Keras need it
    from distill_jax.models.adapters import keras

    return getattr(keras, name)
  raise AttributeError(f"module 'distill_jax.models' has no attribute {name!r}")
