"""`data.from_iterable`: what yields batches, where each begins, continues and ends."""

import itertools
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import data

KEYS = ("image", "label")


def make_batches(n=5, rows=4):
  """Batch i holds the number i."""
  return [{"image": np.full((rows, 2), i, np.float32), "label": np.full(rows, i)} for i in range(n)]


def numbers(batches, limit=None):
  return [int(batch["label"][0]) for batch in itertools.islice(batches, limit)]


class Loader:
  """As torch's with persistent workers: every pass has the same iterator, which starts over."""

  def __init__(self, batches):
    self.batches = batches

  def __iter__(self):
    self.rest = iter(self.batches)
    return LoaderIterator(self)


class LoaderIterator:
  def __init__(self, loader):
    self.loader = loader

  def __iter__(self):
    return self

  def __next__(self):
    return next(self.loader.rest)


class PersistentLoader(Loader):
  def __init__(self, batches):
    super().__init__(batches)
    self.iterator = LoaderIterator(self)

  def __iter__(self):
    self.rest = iter(self.batches)
    return self.iterator


class Resets(Loader):
  """An iterator that `iter` resets."""

  def __iter__(self):
    self.rest = iter(self.batches)
    return self

  def __next__(self):
    return next(self.rest)


class Shared:
  """An iterable of one generator."""

  def __init__(self, batches):
    self.generator = (batch for batch in batches)

  def __iter__(self):
    return self.generator


def shared_function(batches):
  iterator = iter(batches)
  return lambda start: iterator


def of_start(batches):
  return lambda start: itertools.islice(itertools.cycle(batches), start, None)


REPEATED = {
  "list": lambda batches: batches,
  "loader": Loader,
  "persistent": PersistentLoader,
  "function": lambda batches: lambda: (batch for batch in batches),
  "start": of_start,
}
ONE_SHOT = {
  "iterator": iter,
  "generator": lambda batches: (batch for batch in batches),
  "map": lambda batches: map(dict, batches),
  "shared": Shared,
  "function": lambda batches: (lambda it: lambda: it)(iter(batches)),
  "start": shared_function,
}


@pytest.mark.parametrize("kind", REPEATED)
def test_repeated_batches_lose_nothing(kind):
  pipeline = data.from_iterable(REPEATED[kind](make_batches()))
  assert numbers([pipeline.first(), pipeline.first()]) == [0, 0]
  assert not pipeline.is_one_shot
  assert numbers(pipeline(0), 12) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
  assert numbers([pipeline.first()]) == [0]
  if kind != "start":
    assert numbers(pipeline) == numbers(pipeline) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", REPEATED)
def test_repeated_batches_resume(kind, recwarn):
  pipeline = data.from_iterable(REPEATED[kind](make_batches()))
  pipeline.first()
  assert numbers(pipeline(7), 5) == [2, 3, 4, 0, 1]
  assert bool(recwarn) == (kind not in ("list", "start"))


@pytest.mark.parametrize("kind", ONE_SHOT)
def test_one_shot_batches_lose_nothing_and_do_not_resume(kind):
  pipeline = data.from_iterable(ONE_SHOT[kind](make_batches()))
  pipeline.first()
  assert pipeline.is_one_shot
  with pytest.raises(ValueError, match=r"^source: .*resume at step 2"):
    pipeline(2)
  # The first pass has all batches, and there is no second.
  assert numbers(pipeline(0)) == [0, 1, 2, 3, 4]
  with pytest.raises(ValueError, match=r"^source:"):
    pipeline.first()


def test_iterator_that_iter_resets_is_read_from_its_first_batch():
  pipeline = data.from_iterable(Resets(make_batches()))
  pipeline.first()
  assert pipeline.is_one_shot
  assert numbers(pipeline(0), 7) == [0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("kind", ["list", "loader", "function"])
def test_epochs_are_passes(kind):
  pipeline = data.from_iterable(REPEATED[kind](make_batches(3)), epochs=2)
  assert numbers(pipeline(0)) == [0, 1, 2, 0, 1, 2]
  for epochs in (0, 1.5, "2"):
    with pytest.raises(ValueError, match=r"^epochs:"):
      data.from_iterable(make_batches(), epochs=epochs)
  with pytest.raises(ValueError, match=r"^epochs:"):
    data.from_iterable({"image": np.ones((4, 2))}, epochs=2)


@pytest.mark.parametrize("kind", ["map data set", "iter data set", "iterator", "loader"])
def test_grain_resumes_from_its_state(kind):
  grain = pytest.importorskip("grain")

  class Rows(list):
    def __repr__(self):
      return "20 rows"

  def pipeline():
    rows = grain.MapDataset.range(20).seed(1).shuffle().map(lambda i: {"label": np.int64(i)})
    if kind == "loader":
      rows = Rows({"label": np.int64(i)} for i in range(20))
      sampler = grain.samplers.SequentialSampler(20, grain.sharding.NoSharding())
      return grain.DataLoader(
        data_source=rows, sampler=sampler, operations=[grain.transforms.Batch(4)], worker_count=0
      )
    if kind == "map data set":
      return rows.batch(4)
    batches = rows.to_iter_dataset().batch(4)
    return iter(batches) if kind == "iterator" else batches

  expected = [
    batch["label"].tolist() for batch in itertools.islice(data.Pipeline(pipeline())(0), 12)
  ]
  assert sorted(sum(expected[:5], [])) == list(range(20))
  interrupted = data.from_iterable(pipeline())
  interrupted.first()
  assert not interrupted.is_one_shot
  batches = interrupted(0)
  for _ in range(7):
    next(batches)
  resumed = data.from_iterable(pipeline())
  resumed.first()
  resumed.set_state(json.loads(json.dumps(interrupted.get_state())))
  rest = [batch["label"].tolist() for batch in itertools.islice(resumed(7), 5)]
  assert rest == expected[7:]
  assert len(list(interrupted)) == len(list(interrupted)) == 5


def test_position_that_grain_rejects_is_reached_by_reading_again():
  class Stateful(Resets):
    def get_state(self):
      return {"next": 1}

    def set_state(self, state):
      if "next" not in state:
        raise ValueError("DataSource does not match.")
      iter(self)

  pipeline = data.from_iterable(Stateful(make_batches()))
  pipeline.first()
  pipeline.set_state({"epoch": 0, "position": {}, "is_bytes": False})
  with pytest.warns(UserWarning, match="DataSource does not match"):
    assert numbers(pipeline(2), 4) == [2, 3, 4, 0]


class Tensor:
  """As a tensor of torch: numpy reads it through `__array__`, unless it has a gradient."""

  def __init__(self, values, requires_grad=False):
    self.values = np.asarray(values)
    self.requires_grad = requires_grad
    self.shape, self.dtype = self.values.shape, "torch.float32"

  def __array__(self, dtype=None, copy=None):
    if self.requires_grad:
      raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
    return self.values


def test_items_are_named_and_become_numpy_arrays():
  image, label = np.ones((4, 2), np.float32), [0, 1, 2, 0]
  for item in ((Tensor(image), label), [jnp.asarray(image), Tensor(label)]):
    batch = next(iter(data.from_iterable([item], keys=KEYS)))
    assert list(batch) == list(KEYS) and all(type(x) is np.ndarray for x in batch.values())
    np.testing.assert_array_equal(batch["image"], image)
  # Keras writes several inputs as a dict.
  nested = data.from_iterable([({"a": image, "b": image}, label)], keys=("inputs", "label"))
  assert sorted(next(iter(nested))) == ["a", "b", "label"]
  assert list(next(iter(data.from_iterable([image], keys=["image"])))) == ["image"]
  source = data.from_iterable((image, np.array(label)), keys=KEYS)
  assert isinstance(source, data.Source) and source.arrays["label"].tolist() == label
  assert data.from_iterable(source) is source


@pytest.mark.parametrize("keys", [("image",), ("image", "label", "more")])
def test_keys_are_as_many_as_items(keys):
  with pytest.raises(ValueError, match=r"^keys:"):
    data.from_iterable([(np.ones((4, 2)), np.ones(4))], keys=keys).first()


def test_names_and_keys_exclude_each_other():
  with pytest.raises(ValueError, match=r"^keys:"):
    data.from_iterable(make_batches(), keys=KEYS).first()
  with pytest.raises(ValueError, match=r"^keys"):
    data.from_iterable(data.Source({"image": np.ones((2, 2))}), keys=KEYS)


@pytest.mark.parametrize("items", [(np.ones((4, 2)), np.ones(4)), [1, 2], np.ones((4, 2)), 3, "a"])
def test_items_without_names_say_how_to_name_them(items):
  with pytest.raises(ValueError, match=r"^source: .*data\.from_iterable\(.*keys=\(") as error:
    data.from_iterable([items]).first()
  assert ('{"image": array}' in str(error.value)) == isinstance(items, np.ndarray)


@pytest.mark.parametrize(
  "values, got",
  [
    (np.array(["cat", "dog"]), "text"),
    (["cat", "dog"], "text"),
    (np.array([b"cat", b"dog"]), "text"),
    (np.array(["cat", "dog"], object), "text"),
    ([1.0, None], "None at position 1"),
    (None, "None"),
    ([[1, 2], [3]], "list"),
    ([np.ones(2), np.ones(3)], "list"),
    (np.array([{}, set()], object), "objects"),
    (np.array(["2020-01-01"] * 2, "datetime64[D]"), "datetime64"),
    (np.ma.array([1, 2], mask=[False, True]), "masked"),
    ({"a": np.ones(2)}, "dict"),
    (Tensor(np.ones(2), requires_grad=True), "Tensor"),
  ],
)
def test_values_that_are_no_numbers_are_rejected_by_name(values, got):
  with pytest.raises(ValueError, match=rf"^x: .*got.* {got}"):
    data.to_batch({"x": values})
  with pytest.raises(ValueError, match=r"^x: "):
    data.Source({"x": values, "label": np.zeros(2, int)})


def test_masked_array_that_hides_nothing_is_an_array():
  assert data.to_batch({"x": np.ma.array([1, 2])})["x"].tolist() == [1, 2]


@pytest.mark.parametrize("iterable", ["path/to/images", b"path", 3, None, 1.5])
def test_what_is_no_iterable_is_rejected(iterable):
  with pytest.raises(ValueError, match=r"^source:"):
    data.from_iterable(iterable)
  with pytest.raises(ValueError, match=r"^source: .*at least one"):
    data.from_iterable([]).first()


def test_single_examples_are_no_batches():
  with pytest.raises(ValueError, match=r"^source: .*single examples.*batch them"):
    data.from_iterable([(np.ones(3), 1)], keys=KEYS).first()


@pytest.mark.parametrize(
  "entry, change",
  [
    ("label", {"label": None}),
    ("weight", {"weight": np.ones(2)}),
    ("image", {"image": np.ones((2, 3, 1))}),
    ("image", {"image": np.ones((2, 3), np.uint8)}),
    ("label", {"label": np.zeros(2)}),
    ("label", {"label": 1}),
    ("arrays", {"label": np.zeros(3, int)}),
    ("where", {"where": np.ones(2, int)}),
    ("arrays", {"where": np.ones(3, bool)}),
    ("image, label", {"image": np.ones((0, 3)), "label": np.zeros(0, int)}),
  ],
)
def test_batches_unlike_the_first_one_raise(entry, change):
  """numpy and jax raised in the middle of the training, or integers in 'where' took other rows."""
  first = {"image": np.ones((2, 3), np.float32), "label": np.zeros(2, int)}
  second = {name: x for name, x in (first | change).items() if x is not None}
  for read in (iter, lambda pipeline: pipeline(0)):
    batches = read(data.from_iterable([first, second]))
    next(batches)
    with pytest.raises(ValueError, match=rf"^source: batch 1 .*: {entry}: expected"):
      next(batches)


def test_item_that_is_no_batch_does_not_end_the_pass():
  batches = make_batches(3)
  with pytest.raises(ValueError, match=r"^source: batch 1 .*NoneType"):
    list(data.from_iterable([batches[0], None, batches[1]]))


class Endless(Loader):
  """As a data set of TensorFlow after repeat(), or of grain."""

  def cardinality(self):
    return np.int64(-1)


class EndlessByLength(Loader):
  def __len__(self):
    return sys.maxsize


@pytest.mark.parametrize(
  "make",
  [of_start, itertools.cycle, lambda x: lambda: itertools.cycle(x), Endless, EndlessByLength],
)
def test_batches_without_an_end_are_trained_on_but_are_no_pass(make):
  """An evaluation of them never ended."""
  pipeline = data.from_iterable(make(make_batches()))
  pipeline.first()
  for read in (iter, lambda pipeline: pipeline.load()):
    with pytest.raises(ValueError, match=r"^source: .*repeat"):
      read(pipeline)
  assert numbers(pipeline(0), 4) == [0, 1, 2, 3]


class Examples:
  """As a data set of torch: single examples by number."""

  def __len__(self):
    return 3

  def __getitem__(self, i):
    return {"image": np.ones(2), "label": i}


def test_set_of_single_examples_says_how_to_batch_it():
  for keys in (None, KEYS):
    with pytest.raises(ValueError, match=r"^source: .*single examples of Examples.*DataLoader"):
      data.from_iterable(Examples(), keys=keys)


def test_lengths_and_the_mask_of_a_batch_may_differ():
  first = {"tokens": np.ones((2, 3), int)}
  second = {"tokens": np.ones((2, 5), int), "where": np.array([True, False])}
  assert len(list(data.from_iterable([first, second]))) == 2


def test_load_makes_a_source_of_one_pass():
  batches = make_batches(3)
  batches[2]["where"] = np.array([True, False, True, False])
  source = data.from_iterable(batches).load()
  assert source.arrays["label"].tolist() == [0] * 4 + [1] * 4 + [2] * 2
  assert source.ids.tolist() == list(range(10))
  wide = {"image": np.ones((2, 3), np.float32), "label": np.zeros(2, int)}
  with pytest.raises(ValueError, match=r"^source: image: expected \[rows, 2\].* batch 1"):
    data.from_iterable([batches[0], wide]).load()
