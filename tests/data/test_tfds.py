import functools
import gzip
import hashlib
import http.server
import importlib
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import requests
import tensorflow_datasets
from pictures import encoded, idx, noise, write_idx
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.image_classification.cifar import Cifar10
from tensorflow_datasets.image_classification.mnist import FashionMNIST

from distill_jax.data.sets import tfds
from distill_jax.data.sets.builders import read_idx

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(autouse=True, scope="module")
def quiet():
  tensorflow_datasets.disable_progress_bar()


@pytest.fixture
def offline(monkeypatch):
  """Makes all requests fail, as on a machine without network."""

  def head(url, **options):
    raise requests.ConnectionError("Failed to resolve the host")

  def get(self, url, **options):
    raise AssertionError("TFDS tries for minutes: it must not begin")

  monkeypatch.setattr(requests, "head", head)
  monkeypatch.setattr(requests.Session, "get", get)


def rows(images, labels):
  """Returns examples in sorted order: TFDS shuffles them by their keys."""
  return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels))


def pixels(source):
  return np.round(source.arrays["image"] * 255).astype(np.uint8)


def assert_holds(source, images, labels):
  assert rows(pixels(source), source.arrays["label"]) == rows(images, labels)


def test_fashion_mnist_is_prepared_once_from_a_folder(tmp_path, offline):
  arrays = write_idx(tmp_path / "idx")
  sets = tfds.load("fashion_mnist", data_dir=tmp_path, source_files=tmp_path / "idx")
  assert list(sets) == ["train", "test"]
  for split, (images, labels) in arrays.items():
    assert_holds(sets[split], images, labels)
    assert sets[split].arrays["image"].shape[1:] == (28, 28, 1)
    assert sets[split].class_names[:2] == ("T-shirt/top", "Trouser")
    assert sets[split].name == "fashion_mnist/3.0.1"
  assert sets["train"].ids.tolist() == list(range(12)) and sets["test"].ids.tolist() == list(
    range(12, 17)
  )
  again = tfds.load("fashion_mnist", splits=["test"], data_dir=tmp_path)
  assert list(again) == ["test"] and again["test"].ids.tolist() == list(range(12, 17))
  np.testing.assert_array_equal(pixels(again["test"]), pixels(sets["test"]))


def test_files_without_gz_are_read(tmp_path):
  arrays = write_idx(tmp_path / "idx")
  for file in (tmp_path / "idx").iterdir():
    file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
    file.unlink()
  sets = tfds.load("mnist", data_dir=tmp_path, source_files=tmp_path / "idx")
  assert_holds(sets["train"], *arrays["train"])


def test_cifar_is_prepared_from_its_binary_files(tmp_path, offline):
  images, fine = noise(0, 5, 32, 32, 3), np.arange(5, dtype=np.uint8)
  planes = images.transpose(0, 3, 1, 2).reshape(5, 3072)
  ten, hundred = tmp_path / "ten", tmp_path / "hundred"
  ten.mkdir(), hundred.mkdir()
  for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
    (ten / name).write_bytes(np.column_stack([fine, planes]).tobytes())
  (ten / "batches.meta.txt").write_text("".join(f"ten{i}\n" for i in range(10)) + "\n")
  for name in ("train.bin", "test.bin"):
    (hundred / name).write_bytes(np.column_stack([fine // 2, fine + 90, planes]).tobytes())
  (hundred / "coarse_label_names.txt").write_text("".join(f"coarse{i}\n" for i in range(20)))
  (hundred / "fine_label_names.txt").write_text("".join(f"fine{i}\n" for i in range(100)))
  sets = tfds.load("cifar10", data_dir=tmp_path, source_files=ten)
  assert len(sets["train"]) == 25 and sets["train"].class_names[9] == "ten9"
  assert_holds(sets["test"], images, fine)
  sets = tfds.load("cifar100", data_dir=tmp_path, source_files=hundred)
  assert sets["train"].classes == 100 and sets["train"].class_names[99] == "fine99"
  assert_holds(sets["train"], images, fine + 90)


class Handler(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    pass


def test_idx_files_are_downloaded_without_tensorflow(tmp_path, monkeypatch):
  arrays = write_idx(tmp_path / "site")
  server = http.server.ThreadingHTTPServer(
    ("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "site")
  )
  threading.Thread(target=server.serve_forever, daemon=True).start()
  url = f"http://127.0.0.1:{server.server_port}/"
  infos = {}
  for file in (tmp_path / "site").iterdir():
    content = file.read_bytes()
    size = tensorflow_datasets.core.utils.Size(len(content))
    infos[url + file.name] = UrlInfo(size, hashlib.sha256(content).hexdigest(), file.name)
  monkeypatch.setattr(FashionMNIST, "URL", url)
  monkeypatch.setattr(FashionMNIST, "url_infos", infos)
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  try:
    sets = tfds.load("fashion_mnist", data_dir=tmp_path / "data")
  finally:
    server.shutdown()
    server.server_close()
  assert_holds(sets["train"], *arrays["train"])


@pytest.mark.parametrize(
  ("name", "offered"),
  [
    ("mnist", True),
    ("fashion_mnist", True),
    ("cifar10", True),
    ("cifar100", True),
    ("svhn_cropped", False),
  ],
)
def test_unreachable_site_raises_with_the_remedy(tmp_path, offline, name, offered):
  with pytest.raises(ConnectionError, match=f"^{name} .*Failed to resolve") as error:
    tfds.load(name, data_dir=tmp_path)
  assert ("source_files=FOLDER" in str(error.value)) == offered
  assert "copy it to data_dir" in str(error.value)


def test_sets_that_need_tensorflow_raise(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  with pytest.raises(ValueError, match="(?s)^source_files: .*imagenet2012.*ILSVRC2012"):
    tfds.images("imagenet2012", data_dir=tmp_path)
  (tmp_path / "files").mkdir()
  (tmp_path / "files" / "ILSVRC2012_img_train.tar").write_bytes(b"x")
  with pytest.raises(ImportError, match="imagenet2012 .*tensorflow"):
    tfds.images("imagenet2012", data_dir=tmp_path, source_files=tmp_path / "files")
  monkeypatch.setattr(requests, "head", lambda url, **options: requests.Response())
  monkeypatch.setattr(
    Cifar10, "_split_generators", lambda self, downloads: importlib.import_module("tensorflow")
  )
  with pytest.raises(ImportError, match="cifar10 .*tensorflow.*source_files=FOLDER"):
    tfds.images("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("fashion_mnsit", "'fashion_mnsit'.*'fashion_mnist'"),
    ("cifar-10", "'cifar-10'.*'cifar10'"),
    ("zzzzzzzz", "'zzzzzzzz'.*list_builders"),
    ("emnist/letter", "letter"),
    ("cifar10:9.9.9", "9.9.9"),
    ("imdb_reviews", "imdb_reviews of text: Text, label: ClassLabel"),
    ("lfw", "lfw of label: Text, image: Image"),
  ],
)
def test_names_of_no_image_set_raise(tmp_path, name, message):
  with pytest.raises(ValueError, match=f"^name: .*{message}"):
    tfds.load(name, data_dir=tmp_path)


def test_source_files_that_do_not_fit_raise(tmp_path):
  with pytest.raises(ValueError, match=r"^source_files: .*svhn_cropped"):
    tfds.load("svhn_cropped", data_dir=tmp_path, source_files=tmp_path)
  with pytest.raises(FileNotFoundError, match=r"^source_files: .*nowhere"):
    tfds.load("mnist", data_dir=tmp_path, source_files=tmp_path / "nowhere")
  write_idx(tmp_path / "idx")
  (tmp_path / "idx" / "t10k-labels-idx1-ubyte.gz").unlink()
  with pytest.raises(
    FileNotFoundError, match=r"^source_files: expected t10k-labels-idx1-ubyte\.gz in"
  ):
    tfds.load("mnist", data_dir=tmp_path, source_files=tmp_path / "idx")


def test_images_and_labels_that_differ_raise(tmp_path):
  write_idx(tmp_path / "idx")
  labels = np.zeros(11, np.uint8)
  (tmp_path / "idx" / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
  with pytest.raises(ValueError, match=r"expected shape \[11, 28, 28\], got \[12, 28, 28\]"):
    tfds.load("mnist", data_dir=tmp_path, source_files=tmp_path / "idx")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (gzip.compress(idx(noise(0, 4, 3)), mtime=0)[:-9], "is corrupt"),
    (gzip.compress(idx(noise(0, 4, 3)), mtime=0)[:-8] + bytes(8), "is corrupt"),  # the checksum
    (idx(noise(0, 4, 3))[:-1], "is corrupt"),
    (idx(noise(0, 4, 3)) + b"x", "is corrupt"),
    (b"", "IDX file"),
    (b"\0\0\x0d\x01" + bytes(8), "IDX file"),
    (b"\0\0\x08\x03" + bytes(4), "IDX file"),
  ],
)
def test_corrupt_idx_files_raise(tmp_path, content, message):
  (tmp_path / "file").write_bytes(content)
  with pytest.raises(ValueError, match=message):
    read_idx(tmp_path / "file")


def test_unknown_split_raises(tmp_path):
  write_idx(tmp_path / "idx")
  with pytest.raises(ValueError, match=r"^splits: .*'tset'.*'test'"):
    tfds.load("mnist", splits=["tset"], data_dir=tmp_path, source_files=tmp_path / "idx")


class ManySizes(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
  """A user's own set: images of many sizes, three splits."""

  VERSION = tensorflow_datasets.core.Version("1.0.0")
  SIZES = {"test": 3, "train": 6, "validation": 2, "extra": 4}

  def _info(self):
    features = tensorflow_datasets.features
    label = features.ClassLabel(names=["a", "b"])
    return tensorflow_datasets.core.DatasetInfo(
      builder=self,
      features=features.FeaturesDict(
        {"image": features.Image(), "label": label, "note": features.Text()}
      ),
      supervised_keys=("image", "label"),
    )

  def _split_generators(self, downloads):
    return {split: self._generate_examples(split, n) for split, n in self.SIZES.items()}

  def _generate_examples(self, split, n):
    for i in range(n):
      image = encoded(noise(i, 5 + i, 9, 3), "JPEG")
      yield f"{split}{i}", {"image": image, "label": i % 2, "note": "x"}


@pytest.fixture(scope="module")
def many_sizes(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  config = tensorflow_datasets.download.DownloadConfig(try_download_gcs=False)
  builder = ManySizes(data_dir=folder, file_format="array_record")
  builder.download_and_prepare(download_config=config)
  return folder


def test_local_builder_with_images_of_many_sizes(many_sizes):
  sets = tfds.images("many_sizes", splits=["train", "extra", "test"], data_dir=many_sizes)
  ids = {split: images.ids.tolist() for split, images in sets.items()}
  assert ids == {
    "train": [*range(6)],
    "test": [8, 9, 10],
    "extra": [11, 12, 13, 14],
  }  # 6, 7: validation
  for images in sets.values():
    for image, labels in images.decode(images.ids):
      i = image.height - 5
      assert labels["label"] == i % 2 and image.mode == "RGB" and image.width == 9
  with pytest.raises(ValueError, match=r"^size: .*many_sizes/1.0.0"):
    tfds.load("many_sizes", data_dir=many_sizes)
  source = tfds.load("many_sizes", data_dir=many_sizes, size=4)["test"]
  assert source.arrays["image"].shape == (3, 4, 4, 3) and source.class_names == ("a", "b")


def test_copy_that_is_no_array_record_raises(many_sizes, tmp_path):
  folder = tmp_path / "many_sizes" / "1.0.0"
  folder.mkdir(parents=True)
  for file in (many_sizes / "many_sizes" / "1.0.0").iterdir():
    (folder / file.name.replace("array_record", "tfrecord")).write_bytes(file.read_bytes())
  info = json.loads((folder / "dataset_info.json").read_text())
  info["fileFormat"] = "tfrecord"
  (folder / "dataset_info.json").write_text(json.dumps(info))
  with pytest.raises(ValueError, match=r"^data_dir: .*tfrecord"):
    tfds.load("many_sizes", data_dir=tmp_path, size=4)


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_debian_fashion_mnist(tmp_path):
  sets = tfds.load("fashion_mnist", data_dir=tmp_path, source_files=DEBIAN)
  assert {split: len(source) for split, source in sets.items()} == {"train": 60000, "test": 10000}
  for split, prefix in (("train", "train"), ("test", "t10k")):
    images = read_idx(DEBIAN / f"{prefix}-images-idx3-ubyte.gz")
    assert_holds(sets[split], images, read_idx(DEBIAN / f"{prefix}-labels-idx1-ubyte.gz"))
    assert (np.bincount(sets[split].arrays["label"]) == len(images) / 10).all()
