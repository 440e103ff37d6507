"""Makes teachers of functions, files and other teachers. Each is a Model like any other.

A frozen teacher is any Model with `variables`, so most need nothing from here. `host` takes a
function of numpy arrays: a network of any other framework, `onnx` an ONNX file, and `ppocr` a
released recognizer of text. `with_dtype` changes a teacher's dtype and `read_entries` its inputs,
`ensemble` joins several, `cached` reads outputs from the batch, `with_codes` adds the codes of a
layer (`fit_codebook`), `select_classes` selects the student's classes, and `moving_average` follows
the student.
"""

from distill_jax.errors import naming_extras

with naming_extras():
  from distill_jax.teachers.adapted import cached, moving_average, select_classes, with_dtype
  from distill_jax.teachers.codebooks import fit_codebook, with_codes
  from distill_jax.teachers.ensembles import ensemble
  from distill_jax.teachers.entries import read_entries
  from distill_jax.teachers.host_function import host
  from distill_jax.teachers.onnx_file import onnx
  from distill_jax.teachers.ppocr_file import ppocr

__all__ = [
  "cached",
  "ensemble",
  "fit_codebook",
  "host",
  "moving_average",
  "onnx",
  "ppocr",
  "read_entries",
  "select_classes",
  "with_codes",
  "with_dtype",
]
