"""Fashion-MNIST from a cache: the teacher goes over the images once, in 8 augmented views, and every student reads.

python -m distill_jax --config=configs/fashion_mnist_cached.py --seeds=0,1,2

The same command again reuses the cache, and says so. Other ways to keep the teacher's answers, each in a folder of
its own (--config.cache names the cache's):

--config.codec=top_k --config.k=4     the 4 most probable classes and the mass of the rest
--config.codec=samples --config.k=16  16 draws from the teacher

What a way costs and loses, before anything is written; what a cache holds; the teacher asked again about some rows:

python -m distill_jax --config=configs/fashion_mnist_cached.py --stages=cache_estimate
python -m distill_jax --config=configs/fashion_mnist_cached.py --stages=cache_inspect
python -m distill_jax --config=configs/fashion_mnist_cached.py --stages=cache_verify

Measured: not yet.
"""

import dataclasses

from fashion_mnist import FashionMnist

from distill_jax import losses, objectives
from distill_jax.cache import Dense, Samples, TopK
from distill_jax.config import ConfigError, Training
from distill_jax.errors import suggest

CODECS = ("dense", "top_k", "samples")


@dataclasses.dataclass
class Cached(FashionMnist):
  """As `FashionMnist`, with shorter training.

  Attributes:
    codec: 'dense' (float16 logits), 'top_k' or 'samples'.
    k: classes or draws that are kept, where they are.
  """

  cache: str = "runs/fashion_mnist_cached/cache"
  views: int = 8
  codec: str = "dense"
  k: int = 4
  student_training: Training = dataclasses.field(
    default_factory=lambda: Training(steps=1500, batch_size=128, learning_rate=5e-3, weight_decay=1e-3)
  )

  def kept(self):
    if self.codec == "dense":
      return {"logits": Dense("float16")}
    return {"logits": (TopK if self.codec == "top_k" else Samples)(self.k, self.temperature)}

  def objective(self):
    soft = {
      "dense": lambda: objectives.logits(losses.kl_divergence, temperature=self.temperature),
      "top_k": lambda: objectives.sparse(losses.sparse_kl),
      "samples": lambda: objectives.sparse(losses.sampled_cross_entropy),
    }[self.codec]()
    return objectives.weighted(
      hard=(self.hard_weight, objectives.labels()), soft=(1 - self.hard_weight, soft)
    )

  def validate(self) -> None:
    if self.codec not in CODECS:
      raise ConfigError(f"codec: there is no {self.codec!r}{suggest(self.codec, CODECS)}")
    super().validate()


def get_config():
  return Cached()
