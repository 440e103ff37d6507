"""Teacher outputs that are computed once, kept on disk or in an object store, and trusted.

`write_cache` lets a teacher go over the data, `open_cache` opens what it left, and `train.fit` takes the `Cache` in the
place of the teacher:

    outputs = write_cache("teacher_outputs", teacher, train, {"logits": Dense("float16")}, augment=augment, num_views=8)
    fitted = fit(student, outputs, objective, optimizer, train, augment=augment, steps=3000, batch_size=128)

`Dense` keeps an output whole, `TopK` the most probable of many classes, `RandomSampling` draws from them (`codecs`); a name
such as 'logits@top8' keeps 'logits' in one way of several. Of a language model that gives hidden states and a head,
`Dense` keeps 'hidden', and the head once (`heads`, with the bytes that a token takes); `TopK` and `RandomSampling` keep
'logits' without ever holding them (`headed`). The bytes on disk are specified in `format` and `shards`, what a cache is
compared by in `identity`.

`estimate` measures what each codec costs and loses before anything is written, `describe` says what a cache holds, and
`verify` asks the teacher again.
"""

from distill_jax.cache.codecs.dense import Dense, RandomSampling, TopK
from distill_jax.cache.codecs.estimates import Estimate, estimate
from distill_jax.cache.identity import vocabulary
from distill_jax.cache.inspection import describe
from distill_jax.cache.reader import Cache, open_cache
from distill_jax.cache.store.manifest import Mismatch
from distill_jax.cache.store.records import CorruptCache
from distill_jax.cache.store.shards import Incomplete
from distill_jax.cache.teacher.agreement import Agreement, verify
from distill_jax.cache.writer import write_cache

__all__ = [
  "Agreement",
  "Cache",
  "CorruptCache",
  "Dense",
  "Estimate",
  "Incomplete",
  "Mismatch",
  "RandomSampling",
  "TopK",
  "describe",
  "estimate",
  "open_cache",
  "verify",
  "vocabulary",
  "write_cache",
]
