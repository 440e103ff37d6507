"""Stores a teacher's outputs once, in a folder or an object store, and checks each that it reads.

`write_cache` computes them for all examples, `open_cache` opens them, and `train.fit` takes the
`Cache` instead of the teacher:

    outputs = write_cache(
      "teacher_outputs", teacher, train, {"logits": Dense("float16")}, augment=augment, num_views=8
    )
    result = fit(
      student, outputs, objective, optimizer, train, steps=3000, batch_size=128,
      step=StepOptions(augment=augment), run=RunOptions(num_views=8),
    )

`Dense` stores all values of an output, `TopK` the most probable of many classes, `RandomSampling`
samples of them, `Codes` integers (`codecs`); a name such as 'logits@top8' stores 'logits' in one
way of several. Of a language model that returns hidden states and a head, `Dense` stores 'hidden',
and the head once (`teacher.lm_head`, with the bytes per token); `TopK` and `RandomSampling` store
'logits' without ever computing all of them at once (`teacher.lazy_logits`). `store.format` and
`store.shards` specify the bytes on disk, `identity` what a cache depends on.

`import_rows` writes a cache of outputs that others computed: `prompt_logprobs_rows` reads them from
vLLM's JSON lines, `parquet_rows` from lists in parquet files, and `server_rows` asks a server.

`seq_kd` writes the sequences that a teacher generates as pseudo labels, and `pseudo_labels` reads
them as a source (`sequence_level`).

`row_bytes` returns the bytes of one example, and `estimate` measures what each codec loses, before
anything is written (`estimate_table` prints it). `describe` returns what a cache holds, `verify`
compares random rows with the teacher, and `check_run` and `check_teacher` reject a cache of other
data or of another teacher.
"""

from distill_jax.errors import naming_extras

with naming_extras():
  from distill_jax.cache.codecs.codes import Codes
  from distill_jax.cache.codecs.dense_codec import Dense
  from distill_jax.cache.codecs.estimates import Estimate, estimate, estimate_table, row_bytes
  from distill_jax.cache.codecs.random_sampling import RandomSampling
  from distill_jax.cache.codecs.top_k import TopK
  from distill_jax.cache.compatibility import check_run, check_teacher, check_teacher_weights
  from distill_jax.cache.identity import vocabulary
  from distill_jax.cache.importing.import_rows import import_rows
  from distill_jax.cache.importing.parquet import parquet_rows
  from distill_jax.cache.importing.prompt_logprobs import prompt_logprobs_rows
  from distill_jax.cache.importing.server_rows import server_rows
  from distill_jax.cache.inspection import describe
  from distill_jax.cache.reader import Cache, open_cache
  from distill_jax.cache.sequence_level.reading import pseudo_labels
  from distill_jax.cache.sequence_level.writing import seq_kd
  from distill_jax.cache.store.manifest import Mismatch
  from distill_jax.cache.store.records import CorruptCache
  from distill_jax.cache.store.shards import Incomplete
  from distill_jax.cache.teacher.agreement import Agreement, verify
  from distill_jax.cache.writer import write_cache

__all__ = [
  "Agreement",
  "Cache",
  "Codes",
  "CorruptCache",
  "Dense",
  "Estimate",
  "Incomplete",
  "Mismatch",
  "RandomSampling",
  "TopK",
  "check_run",
  "check_teacher",
  "check_teacher_weights",
  "describe",
  "estimate",
  "estimate_table",
  "import_rows",
  "open_cache",
  "parquet_rows",
  "prompt_logprobs_rows",
  "pseudo_labels",
  "row_bytes",
  "seq_kd",
  "server_rows",
  "verify",
  "vocabulary",
  "write_cache",
]
