"""distil-whisper's student: the teacher's encoder, run once, and two layers of its decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from distill_jax import losses, objectives, reduce
from distill_jax.compression.initialization.teacher import init_from_teacher
from distill_jax.cost.flops import product_flops
from distill_jax.models import from_nnx, shared_prefix, whole_variables
from distill_jax.models.seq2seq.encoder_decoder import INPUTS, EncoderDecoder
from distill_jax.models.seq2seq.encoder_decoder_config import EncoderDecoderConfig
from distill_jax.train import make_init, make_train_step
from distill_jax.types import Variables

KEY = jax.random.key(0)
ROWS, SOURCE, TARGET, VOCABULARY = 16, 14, 12, 40
CONFIG = EncoderDecoderConfig(
  VOCABULARY, 32, encoder_layers=1, decoder_layers=2, num_heads=2, source_vocab_size=VOCABULARY
)
ENCODER = "^(source_embed|encoder)/"
FIRST_AND_LAST = {
  r"^decoder/blocks/0/": "decoder/blocks/0/",
  r"^decoder/blocks/1/": "decoder/blocks/2/",
  r"^(embed|decoder/norm)/": r"\1/",
}
OPTIMIZER = optax.sgd(0.1)
OBJECTIVE = objectives.weighted(
  word=(1.0, objectives.tokens(losses.kl_divergence, temperature=2.0, label_weight=0.8))
)


def decode(net, tokens, encoded, segments, train):
  del train
  return net.decode(tokens, encoded, segments)


def models(depth, seed=None):
  """An `EncoderDecoder`, and its decoder on what is encoded."""
  config = dataclasses.replace(CONFIG, decoder_layers=depth)
  build = lambda rngs: EncoderDecoder(config, rngs=rngs)  # noqa: E731
  network = build if seed is None else build(nnx.Rngs(seed))
  inputs = ("tokens", "encoded", "source_segments")
  return from_nnx(network, inputs=INPUTS), from_nnx(network, inputs=inputs, call=decode)


TEACHER, TEACHER_DECODER = models(2, seed=1)
WHOLE, DECODER = models(1)
STUDENT = shared_prefix(WHOLE, TEACHER, ENCODER, rest=DECODER)


def trace(batch, student=STUDENT):
  state = jax.eval_shape(make_init(student, TEACHER, OBJECTIVE, OPTIMIZER), KEY, batch)
  step = make_train_step(student, TEACHER, OBJECTIVE, OPTIMIZER)
  return jax.jit(step).trace(state, TEACHER.variables, batch)


def outputs_of(model, variables, batch):
  return model.apply(*variables, batch, train=False, key=None)[0]


def test_step_costs_one_encoder_and_two_decoders():
  source, tokens = jnp.zeros((ROWS, SOURCE), int), jnp.zeros((ROWS, TARGET), int)
  batch = {"source": source, "source_segments": source, "tokens": tokens, "label": tokens}
  student = STUDENT.init(KEY, batch)
  encoded = jnp.zeros((ROWS, SOURCE, CONFIG.embed_dim))
  hidden = jnp.zeros((ROWS, TARGET, CONFIG.embed_dim))
  head = (jnp.zeros((CONFIG.embed_dim, VOCABULARY)), None, None)

  def encoder(variables, batch):
    return outputs_of(TEACHER, variables, batch)["encoded"]

  def teacher_decoder(variables, batch, encoded):
    outputs = outputs_of(TEACHER_DECODER, variables, {**batch, "encoded": encoded})
    return outputs["hidden"], outputs["head"]

  def student_decoder(params, state, batch, encoded, hidden, head):
    def loss(params):
      variables = whole_variables(Variables(params, state))
      outputs = outputs_of(DECODER, variables, {**batch, "encoded": encoded})
      teacher = {"hidden": hidden, "head": head}
      none = {"word": {}}
      terms, _ = OBJECTIVE.apply(none, none, outputs, teacher, batch, step=0, key=KEY)
      return reduce.mean(*terms["word"][1])

    return jax.value_and_grad(loss)(params)

  calls = [
    (encoder, (TEACHER.variables, batch)),
    (teacher_decoder, (TEACHER.variables, batch, encoded)),
    (student_decoder, (*student, batch, encoded, hidden, head)),
  ]
  parts = [jax.jit(function).trace(*arguments) for function, arguments in calls]
  flops = [part.lower().compile().cost_analysis()["flops"] for part in parts]
  step = trace(batch)
  compiled = step.lower().compile()
  np.testing.assert_allclose(compiled.cost_analysis()["flops"], sum(flops), rtol=0.01)
  products = [product_flops(part.jaxpr) for part in parts]
  assert product_flops(step.jaxpr) == sum(products)
  # A student with an encoder of its own trains it, too; and the gradient reaches it.
  more = product_flops(trace(batch, WHOLE).jaxpr) - product_flops(step.jaxpr)
  assert more > 3 * products[0]


def test_decoder_has_the_first_and_the_last_layer_of_the_teachers():
  teacher = models(3, seed=1)[0].variables.params
  student = models(2, seed=2)[0].variables.params
  initial, _ = init_from_teacher(student, teacher, FIRST_AND_LAST)
  blocks = initial["decoder"]["blocks"]
  for k, source in ((0, 0), (1, 2)):
    jax.tree.map(np.testing.assert_array_equal, blocks[k], teacher["decoder"]["blocks"][source])
  for name in ("embed", "encoder"):
    expected = teacher if name == "embed" else student
    jax.tree.map(np.testing.assert_array_equal, initial[name], expected[name])
