"""Codes a teacher's layer: the numbers of the nearest of some learned vectors, per frame."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.errors import check_integer, suggest
from distill_jax.types import Batch, Model, Variables


def fit_codebook(
  features: Any, num_codes: int, *, num_codebooks: int = 1, seed: int = 0
) -> np.ndarray:
  """Returns codebooks of features by scikit-learn's `MiniBatchKMeans`.

  One codebook is HuBERT's (Hsu et al. 2021, arXiv:2106.07447: 100 or 500 clusters). Each of several
  is fitted on what the ones before leave (residual quantization). MVQ (Guo et al. 2022,
  arXiv:2211.00508: 8 or 16 of 256 codes) trains them jointly, with a smaller error.

  Args:
    features: of frames that count, [N, D], at least `num_codes` of them.
    num_codes: number of vectors of each codebook.
    num_codebooks: number of codebooks.
    seed: of k-means.

  Returns:
    float32 [num_codebooks, num_codes, D].

  Raises:
    ValueError: features of another shape, too few, or not finite; numbers below 1.

  >>> features = np.array([[0.0], [0.0], [1.0], [1.0]])
  >>> codebook = fit_codebook(features, 2)
  >>> sorted(codebook[0, :, 0].tolist())
  [0.0, 1.0]
  """
  from sklearn.cluster import MiniBatchKMeans

  check_integer("num_codes", num_codes, 1)
  check_integer("num_codebooks", num_codebooks, 1)
  residual = np.asarray(features, np.float32)
  if residual.ndim != 2 or len(residual) < num_codes or not np.isfinite(residual).all():
    raise ValueError(
      f"features: expected at least {num_codes} finite rows [N, D], got {residual.shape}: leave "
      "padded frames out, features[is_valid]"
    )
  centers = []
  for number in range(num_codebooks):
    means = MiniBatchKMeans(num_codes, random_state=seed + number, n_init=3).fit(residual)
    centers.append(means.cluster_centers_.astype(np.float32))
    residual = residual - centers[-1][means.labels_]
  return np.stack(centers)


def with_codes(teacher: Model, layer: str, codebook: Any, *, output: str = "codes") -> Model:
  """Returns the teacher with one more output: its layer's codes, int32 [B, T, num_codebooks].

      codebook = teachers.fit_codebook(features, 500)
      coded = teachers.with_codes(teacher, "block6", codebook)
      write_cache(folder, coded, train, {"codes": Codes(500)})  # 2 bytes a frame

  `objectives.codes` reads it, live or cached. The codebook is among the weights: the identity of a
  cache covers it. Rounding may decide between two vectors that are equally near.

  Args:
    teacher: a Model with its variables.
    layer: name of its output [B, ..., D].
    codebook: float [num_codebooks, num_codes, D] (`fit_codebook`).
    output: name of the output.

  Raises:
    ValueError: a teacher without variables, a codebook of another shape; when it is applied, a
      layer that does not exist or has another width.

  >>> from distill_jax import models, teachers
  >>> model = models.from_apply(None, lambda w, x: {"hidden": x * w}, variables=1.0, inputs="x")
  >>> coded = teachers.with_codes(model, "hidden", np.array([[[0.0], [1.0]]]))
  >>> batch = {"x": jnp.array([[[0.9], [0.2]]])}
  >>> coded.apply(*coded.variables, batch, train=False, key=None)[0]["codes"].tolist()
  [[[1], [0]]]
  """
  if teacher.variables is None:
    raise ValueError("teacher: expected a Model with variables, got none: pass a frozen one")
  codebook = jnp.asarray(codebook, jnp.float32)
  if codebook.ndim != 3:
    raise ValueError(
      f"codebook: expected [num_codebooks, num_codes, width], got {codebook.shape}: write "
      "codebook[None] for one"
    )
  params, state = teacher.variables
  variables = Variables({"teacher": params, "codebook": codebook}, state)

  def apply(params: Any, state: Any, batch: Batch, *, train: bool, key: Any):
    outputs, state = teacher.apply(params["teacher"], state, batch, train=train, key=key)
    if layer not in outputs:
      raise ValueError(
        f"layer: expected an output of the teacher, got {layer!r}{suggest(layer, outputs)}"
      )
    return {**outputs, output: nearest_codes(outputs[layer], params["codebook"])}, state

  return teacher._replace(init=lambda key, batch: variables, apply=apply, variables=variables)


def nearest_codes(features: jax.Array, codebook: jax.Array) -> jax.Array:
  """Returns the codes of features [..., D], int32 [..., num_codebooks], each of the residual.

  Raises:
    ValueError: the codebook has another width.
  """
  if features.shape[-1] != codebook.shape[-1]:
    raise ValueError(
      f"codebook: expected vectors of width {features.shape[-1]}, that of the layer, got "
      f"{codebook.shape[-1]}: fit it on this layer"
    )
  residual = features.astype(jnp.float32)
  codes = []
  for centers in codebook.astype(jnp.float32):
    products = jnp.einsum("...d,nd->...n", residual, centers, precision="highest")
    codes.append(jnp.argmax(products - (centers**2).sum(-1) / 2, -1).astype(jnp.int32))
    residual = residual - centers[codes[-1]]
  return jnp.stack(codes, -1)
