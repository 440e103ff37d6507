"""Tests weights from files: names, shapes, dtypes, layouts, and one released model."""

import dataclasses
import json
import os
import pathlib
import pickle
import warnings
import zipfile

import g2p
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.flax
import safetensors.numpy
import scipy.signal
from flax import nnx

from distill_jax import losses, objectives, reduce
from distill_jax.models import from_nnx, load_weights, pretrained, torch_kernel, weights
from distill_jax.models.decoding import sampler, target_rows
from distill_jax.models.seq2seq.encoder_decoder import INPUTS
from distill_jax.models.seq2seq.g2p import CONFIG, g2p_steps, load_g2p
from distill_jax.models.seq2seq.recurrent import RecurrentEncoderDecoder
from distill_jax.storage import student
from distill_jax.train import make_init, make_train_step
from distill_jax.types import Variables

LIKE = Variables(
  {"head": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}, {"mean": jnp.zeros(3)}
)
NAMES = {
  "params/head/kernel": ("fc.weight", torch_kernel),
  "params/head/bias": "fc.bias",
  "state/mean": "mean",
}
KEY = jax.random.key(0)


def file_arrays(rng):
  return {
    "fc.weight": rng.normal(size=(2, 3)).astype(np.float32),
    "fc.bias": rng.normal(size=2).astype(np.float32),
    "mean": rng.normal(size=3).astype(np.float32),
  }


def write(path, arrays):
  if path.suffix == ".npz":
    np.savez(path, **arrays)
  else:
    safetensors.numpy.save_file(arrays, path)
  return path


@pytest.fixture(params=["weights.safetensors", "weights.npz"])
def path(request, tmp_path):
  return tmp_path / request.param


def test_every_leaf_comes_from_its_entry(rng, path):
  arrays = file_arrays(rng)
  got = load_weights(write(path, arrays), LIKE, names=NAMES)
  assert jax.tree.structure(got) == jax.tree.structure(LIKE)
  np.testing.assert_array_equal(got.params["head"]["kernel"], arrays["fc.weight"].T)
  np.testing.assert_array_equal(got.params["head"]["bias"], arrays["fc.bias"])
  np.testing.assert_array_equal(got.state["mean"], arrays["mean"])
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(got))


def test_names_may_be_equal_or_a_function(rng, path):
  arrays = file_arrays(rng)
  like = {
    "a": jax.ShapeDtypeStruct((3,), jnp.float32),
    "b": {"c": jax.ShapeDtypeStruct((2,), jnp.float32)},
  }
  got = load_weights(write(path, {"a": arrays["mean"], "b/c": arrays["fc.bias"]}), like)
  np.testing.assert_array_equal(got["b"]["c"], arrays["fc.bias"])
  write(path, {"net.a": arrays["mean"], "net.b.c": arrays["fc.bias"]})
  got = load_weights(path, like, names=lambda name: "net." + name.replace("/", "."))
  np.testing.assert_array_equal(got["a"], arrays["mean"])
  write(path, {"A": arrays["mean"], "b/c": arrays["fc.bias"]})
  got = load_weights(path, like, names={"a": "A"})
  np.testing.assert_array_equal(got["b"]["c"], arrays["fc.bias"])


def test_packed_projections_are_split(rng, path):
  packed = rng.normal(size=(6, 4)).astype(np.float32)
  names = {part: ("qkv", lambda w, i=i: w[2 * i : 2 * i + 2].T) for i, part in enumerate("qkv")}
  got = load_weights(
    write(path, {"qkv": packed}), {part: jnp.zeros((4, 2)) for part in "qkv"}, names=names
  )
  for i, part in enumerate("qkv"):
    np.testing.assert_array_equal(got[part], packed[2 * i : 2 * i + 2].T)


def test_torch_kernels_compute_as_in_torch(rng):
  linear, x = rng.normal(size=(5, 3)), rng.normal(size=(2, 3))
  np.testing.assert_allclose(x @ torch_kernel(linear), np.einsum("oi,bi->bo", linear, x))
  window, image = rng.normal(size=(4, 3, 3, 2)), rng.normal(size=(6, 7, 3))
  expected = [
    sum(scipy.signal.correlate2d(image[..., i], window[o, i], "valid") for i in range(3))
    for o in range(4)
  ]
  conv = nnx.Conv(3, 4, (3, 2), padding="VALID", use_bias=False, rngs=nnx.Rngs(0))
  conv.kernel[...] = jnp.asarray(torch_kernel(window), jnp.float32)
  np.testing.assert_allclose(
    conv(jnp.asarray(image[None])), np.stack(expected, -1)[None], rtol=1e-4, atol=1e-5
  )
  with pytest.raises(ValueError, match=r"^weight"):
    torch_kernel(np.zeros(3))


# What does not fit


def test_each_difference_has_its_line(rng, path):
  arrays = file_arrays(rng)
  arrays["fc.bias_"] = arrays.pop("fc.bias")
  arrays["mean"] = np.zeros(4, np.float32)
  arrays["extra"] = np.zeros((1, 2), np.float32)
  names = {**NAMES, "params/head/kernel": "fc.weight"}
  with pytest.raises(ValueError) as error:
    load_weights(write(path, arrays), LIKE, names=names)
  assert str(error.value).splitlines() == [
    f"path: {path} does not fit the network:",
    "  missing: fc.bias, for params/head/bias float32[2]; did you mean 'fc.bias_'?",
    "  shape: params/head/kernel <- fc.weight is float32[2,3], expected float32[3,2]"
    "; use torch_kernel",
    "  shape: state/mean <- mean is float32[4], expected float32[3]",
    "  unexpected: extra float32[1,2]: use it, or add it to ignore",
    "  unexpected: fc.bias_ float32[2]: use it, or add it to ignore",
  ]


def test_unused_entries_raise_unless_ignored(rng, path):
  write(path, {**file_arrays(rng), "norm.num_batches_tracked": np.zeros((), np.int64)})
  with pytest.raises(ValueError, match=r"unexpected: norm.num_batches_tracked int64\[\]"):
    load_weights(path, LIKE, names=NAMES)
  load_weights(path, LIKE, names=NAMES, ignore=["*.num_batches_tracked"])


def test_function_that_fails_or_gives_another_shape_raises(rng, path):
  write(path, file_arrays(rng))
  names = {**NAMES, "state/mean": ("mean", torch_kernel)}
  with pytest.raises(ValueError, match=r"function: state/mean <- mean float32\[3\]"):
    load_weights(path, LIKE, names=names)
  names = {**NAMES, "state/mean": ("mean", lambda w: w[:2])}
  with pytest.raises(
    ValueError, match=r"shape: state/mean <- mean is float32\[2\], expected float32\[3\]$"
  ):
    load_weights(path, LIKE, names=names)


def test_names_with_a_key_that_is_no_leaf_raise(rng, path):
  with pytest.raises(ValueError, match="^names: .*kernl'; did you mean 'params/head/kernel'"):
    load_weights(write(path, file_arrays(rng)), LIKE, names={"params/head/kernl": "fc.weight"})


@pytest.mark.parametrize(
  ("stored", "dtype", "fits"),
  [
    (np.float64([1.5, 2]), jnp.float32, True),
    (np.float16([1.5, 2]), jnp.float32, True),
    (np.float32([1.5, np.inf]), jnp.bfloat16, True),
    (np.int64([1, 2]), jnp.int32, True),
    (np.float32([1e30, 1]), jnp.float16, False),
    (np.int64([2**40, 1]), jnp.int32, False),
    (np.int64([1, 2]), jnp.float32, False),
    (np.float32([1, 2]), jnp.int32, False),
    (np.array([True, False]), jnp.float32, False),
  ],
)
def test_dtypes_are_cast_only_within_kind_and_range(path, stored, dtype, fits):
  write(path, {"w": stored})
  like = {"w": jax.ShapeDtypeStruct((2,), dtype)}
  with pytest.raises(ValueError, match=rf"dtype: w <- w is {stored.dtype}\[2\], expected"):
    load_weights(path, like)
  if not fits:
    with pytest.raises(ValueError, match=rf"dtype: w <- w is {stored.dtype}\[2\]"):
      load_weights(path, like, cast=True)
    return
  got = load_weights(path, like, cast=True)["w"]
  assert got.dtype == dtype
  np.testing.assert_array_equal(np.float64(got), np.float64(stored))


def test_bfloat16_is_read(tmp_path):
  safetensors.flax.save_file({"w": jnp.array([1.5, 2], jnp.bfloat16)}, tmp_path / "w.safetensors")
  got = load_weights(tmp_path / "w.safetensors", {"w": jnp.zeros(2, jnp.bfloat16)})["w"]
  assert got.dtype == jnp.bfloat16 and got.tolist() == [1.5, 2]


def test_pickles_are_never_opened(tmp_path):
  class Trap:
    def __reduce__(self):
      return pathlib.Path.touch, (tmp_path / "ran",)

  np.savez(tmp_path / "w.npz", w=np.array([Trap()], dtype=object))
  for name in ("w.pt", "w.safetensors", "raw.npz"):
    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
  for name in ("w.npz", "w.pt", "w.safetensors", "raw.npz"):
    with pytest.raises(ValueError, match="^path: "):
      load_weights(tmp_path / name, LIKE)
  assert not (tmp_path / "ran").exists()


def test_corrupt_and_missing_files_raise(rng, path):
  with pytest.raises(FileNotFoundError, match=path.name):
    load_weights(path, LIKE)
  content = write(path, file_arrays(rng)).read_bytes()
  for corrupt in (b"", content[:20], content[:-20]):
    path.write_bytes(corrupt)
    with pytest.raises(ValueError, match="^path: .*corrupt"):
      load_weights(path, LIKE, names=NAMES)


def test_a_bomb_is_not_decompressed(rng, tmp_path, monkeypatch):
  """Not of an entry either that would be ignored."""
  monkeypatch.setattr(weights, "_ANY_SIZE", 2**16)
  arrays = file_arrays(rng) | {"unused": np.zeros(2**20, np.float32)}
  np.savez_compressed(tmp_path / "w.npz", **arrays)
  with pytest.raises(ValueError, match="^path: .*bomb"):
    load_weights(tmp_path / "w.npz", LIKE, names=NAMES, ignore=("unused",))


def test_doubled_names_raise(rng, tmp_path):
  np.savez(tmp_path / "w.npz", **file_arrays(rng))
  with zipfile.ZipFile(tmp_path / "w.npz", "a") as archive, warnings.catch_warnings():
    warnings.simplefilter("ignore")
    archive.writestr("mean.npy", archive.read("mean.npy"))
  with pytest.raises(ValueError, match="^path: .*two arrays .*'mean'"):
    load_weights(tmp_path / "w.npz", LIKE, names=NAMES)


def test_doubled_names_of_a_safetensors_file_raise(tmp_path):
  entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
  header = f"{{{entry}, {entry}}}".encode()
  path = tmp_path / "w.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
  with pytest.raises(ValueError, match=r"^path: .*w\.safetensors .*'a'"):
    load_weights(path, {"a": np.zeros(1, np.float32)})
  with pytest.raises(ValueError, match=r"w\.safetensors .*'a'"):
    student.load_weights(path)


def test_members_of_an_archive_that_are_no_arrays_raise(rng, tmp_path):
  np.savez(tmp_path / "w.npz", **file_arrays(rng))
  with zipfile.ZipFile(tmp_path / "w.npz", "a") as archive:
    archive.writestr("notes.txt", b"text")
  with pytest.raises(ValueError, match=r"^path: .*w\.npz .*'notes\.txt'"):
    load_weights(tmp_path / "w.npz", LIKE, names=NAMES)


@pytest.mark.parametrize("name", ["w.npz", "w.safetensors", "model.safetensors.index.json"])
def test_pipes_and_links_without_an_end_are_not_opened(tmp_path, name):
  path = tmp_path / name
  os.mkfifo(path)
  with pytest.raises(FileNotFoundError, match=f"^path: .*{path}.* regular"):
    load_weights(path, LIKE)
  path.unlink()
  path.symlink_to(path)
  with pytest.raises(FileNotFoundError, match=f"^path: .*{path}.* regular"):
    load_weights(path, LIKE)


@pytest.mark.parametrize(
  "text",
  [
    '{"weight_map": {"mean": "model.safetensors.index.json"}}',
    '{"weight_map": ' + "[" * 100_000,
    '{"weight_map": {"mean": "a.safetensors", "mean": "b.safetensors"}}',
  ],
  ids=["itself", "deep", "doubled"],
)
def test_an_index_without_an_end_raises(tmp_path, text):
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(text)
  with pytest.raises(ValueError, match="^path: .*corrupt"):
    load_weights(index, LIKE, names=NAMES)


# As a Model


def test_pretrained_models_start_from_the_file(rng, path):
  arrays, batch = file_arrays(rng), {"image": rng.normal(size=(4, 3)).astype(np.float32)}
  names = {"params/kernel": ("fc.weight", torch_kernel), "params/bias": "fc.bias"}
  write(path, {name: arrays[name] for name in ("fc.weight", "fc.bias")})
  for module in (lambda rngs: nnx.Linear(3, 2, rngs=rngs), nnx.Linear(3, 2, rngs=nnx.Rngs(0))):
    model = pretrained(from_nnx(module), path, batch, names=names)
    assert isinstance(model.variables, Variables)
    outputs, _ = model.apply(*model.init(KEY, batch), batch, train=False, key=None)
    expected = batch["image"] @ arrays["fc.weight"].T + arrays["fc.bias"]
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-5, atol=1e-5)
    for leaf in jax.tree.leaves(model.init(KEY, batch)):
      leaf.delete()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(model.variables))
  with pytest.raises(ValueError, match="^batch: "):
    pretrained(from_nnx(lambda rngs: nnx.Linear(3, 2, rngs=rngs)), path)


# A released model: g2p-en. On 4,096 other words of cmudict this network with these weights has a
# phone error rate of 10.1 % and 68.4 % of the words correct.


@pytest.fixture(scope="module")
def teacher():
  path = g2p.released()
  if path is None:
    pytest.skip("g2p-en is not installed (3 MB, in the extra `test`)")
  return load_g2p(path)


def test_released_model_pronounces_as_published(teacher):
  assert sum(leaf.size for leaf in jax.tree.leaves(teacher.variables)) == 834_890
  words, expected = g2p.dictionary()
  found = g2p.pronounce(teacher.variables, words)
  assert g2p.phone_error_rate(found, expected) < 0.11
  assert sum(a == b for a, b in zip(found, expected)) >= 140
  # The example of its README.
  word = g2p.pronounce(teacher.variables, ["activationist"])
  assert word == ["AE2 K T IH0 V EY1 SH AH0 N IH0 S T".split()]


def test_released_model_teaches(teacher):
  batch = g2p.spell(g2p.dictionary()[0][:64])
  steps = g2p_steps()
  sequences = jax.jit(sampler(steps, max_length=10))(teacher.variables, None, batch)
  inputs, label = target_rows(*sequences, start_token=steps.start_token, end_token=steps.end_token)
  batch |= {"tokens": inputs, "label": label}
  config = dataclasses.replace(CONFIG, embed_dim=16, hidden_dim=16)
  student = from_nnx(lambda rngs: RecurrentEncoderDecoder(config, rngs=rngs), inputs=INPUTS)
  objective = objectives.weighted(soft=(1.0, objectives.tokens(losses.kl_divergence)))
  optimizer = optax.adam(0.02)
  state = jax.jit(make_init(student, teacher, objective, optimizer))(KEY, batch)
  step = jax.jit(make_train_step(student, teacher, objective, optimizer), donate_argnums=0)
  values = []
  for _ in range(15):
    state, metrics = step(state, teacher.variables, batch)
    values.append(float(reduce.value(metrics["soft"])))
  assert values[-1] < 0.7 * values[0]


def test_checkpoint_in_several_files(rng, tmp_path):
  arrays = file_arrays(rng)
  parts = {"fc.weight": "a.safetensors", "fc.bias": "b.safetensors", "mean": "b.safetensors"}
  for file in set(parts.values()):
    write(tmp_path / file, {name: arrays[name] for name in parts if parts[name] == file})
  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
  write(tmp_path / "single.safetensors", arrays)
  parts_tree, single = (
    load_weights(file, LIKE, names=NAMES) for file in (index, tmp_path / "single.safetensors")
  )
  jax.tree.map(np.testing.assert_array_equal, parts_tree, single)
  for files, error, field in (
    (parts | {"mean": "a.safetensors"}, ValueError, "mean in a.safetensors"),
    (parts | {"mean": "../a.safetensors"}, ValueError, "corrupt"),
    (parts | {"mean": "c.safetensors"}, FileNotFoundError, "c.safetensors"),
    (None, ValueError, "corrupt"),
  ):
    index.write_text(json.dumps({"weight_map": files} if files else []))
    with pytest.raises(error, match=f"^path: .*{field}"):
      load_weights(index, LIKE, names=NAMES)
