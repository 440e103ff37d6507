"""Compares the teacher of a cache that is not written yet with the one of a written cache."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import objectives
from distill_jax.cache import Dense, write_cache
from distill_jax.cost.cached import cached_teacher
from distill_jax.data import text
from distill_jax.models import from_apply
from distill_jax.types import Variables

CLASSES, LENGTH, WIDTH = 7, 6, 3


def test_hidden_states_bring_the_head_as_a_written_cache_does(tmp_path):
  params = {"embed": jnp.ones((CLASSES, WIDTH)), "kernel": jnp.ones((WIDTH, CLASSES))}
  params["bias"] = jnp.ones(CLASSES)

  def apply(params, tokens):
    hidden = params["embed"][tokens]
    return {"hidden": hidden, "head": (params["kernel"], params["bias"], 5.0)}

  model = from_apply(lambda key, tokens: params, apply, inputs="tokens")
  tokenizer = text.BYTES._replace(size=CLASSES, end=CLASSES - 1)
  source = text.pack([np.arange(CLASSES - 1)] * 16, length=LENGTH, tokenizer=tokenizer)
  codecs = {"hidden": Dense("int8")}
  teacher = model._replace(variables=Variables(params, {}))
  written = write_cache(tmp_path, teacher, source, codecs, batch_size=8, progress=False)
  batch = {name: x[:2] for name, x in source.arrays.items()}
  planned, shapes = cached_teacher(model, jax.eval_shape(lambda: batch), codecs)

  def outputs(model, batch):
    def call(variables, batch):
      return model.apply(*variables, batch, train=False, key=None)[0]

    return jax.eval_shape(call, tuple(model.variables), batch)

  expected = outputs(written.model, written.add_columns(batch))
  assert outputs(planned, shapes) == expected
  term = objectives.tokens()
  term.init(jax.random.key(0), expected, outputs(planned, shapes))
