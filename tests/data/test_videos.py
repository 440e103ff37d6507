"""Videos of different lengths in splits, streams and caches."""

import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import cache, data, objectives
from distill_jax.data.clips import random_clip, uniform_clips
from distill_jax.data.leaks import check_no_shared_groups
from distill_jax.data.stream import EvalStream, Stream
from distill_jax.data.videos import Videos
from distill_jax.models import from_apply
from distill_jax.train import fit

LENGTHS = (4, 9, 6, 5, 7, 8)


def frames(lengths=LENGTHS):
  """Returns series whose values are 100 id + frame."""
  return [np.float32(100 * id + np.arange(n))[:, None] for id, n in enumerate(lengths)]


def videos(arrays=None, **entries):
  arrays = frames() if arrays is None else arrays
  label = np.arange(len(arrays)) % 2
  return Videos(arrays, data.Source({"label": label, **entries}, classes=2, name="toy"))


def test_stream_yields_the_clip_of_each_id_and_view():
  examples = videos()
  crop = random_clip(3, seed=4)
  for batch in itertools.islice(Stream(examples, 2, crop, seed=1, num_views=2, threads=2)(0), 7):
    assert batch["image"].shape == (2, 3, 1)
    np.testing.assert_array_equal(batch["label"], batch["id"] % 2)
    for id, view, clip in zip(batch["id"].tolist(), batch["view"].tolist(), batch["image"]):
      assert view in (0, 1)
      np.testing.assert_array_equal(clip, crop(examples.frames[id], id, view))


def test_evaluation_has_all_views_of_each_video_once():
  batches = list(EvalStream(videos(), 4, uniform_clips(3, clips=2), threads=2))
  assert [batch["image"].shape for batch in batches] == [(4, 2, 3, 1)] * 2
  assert [batch["where"].tolist() for batch in batches] == [[True] * 4, [True] * 2 + [False] * 2]
  np.testing.assert_array_equal(batches[1]["image"][1, 1, :, 0], [505, 506, 507])


def test_padded_clips_bring_their_mask():
  stream = Stream(videos(), 2, random_clip(8, seed=0, short="pad"), seed=0, threads=2)
  batch = next(stream(0))
  valid = np.minimum(np.array(LENGTHS)[batch["id"]], 8)
  np.testing.assert_array_equal(batch["image_valid"].sum(1), valid)


@pytest.mark.parametrize("make", [Stream, EvalStream])
def test_video_that_is_too_short_is_named_before_training(make):
  more = {"seed": 0} if make is Stream else {}
  with pytest.raises(ValueError, match="length: .*id 0"):
    make(videos(), 2, random_clip(5, seed=0), **more)
  pictures = [np.zeros((5, *sides, 1), np.uint8) for sides in ((8, 8), (8, 6), (7, 9))]
  with pytest.raises(ValueError, match="size: .*id 1"):
    make(videos(pictures), 2, random_clip(5, seed=0, size=7), **more)


def test_split_keeps_groups_and_ids():
  examples = videos(person=np.array([0, 0, 1, 1, 2, 2]))
  rest, held_out = data.split(examples, 0.4, groups="person")
  assert len(rest) + len(held_out) == 6
  people = [set(part.integers("groups", "person").tolist()) for part in (rest, held_out)]
  assert not people[0] & people[1]
  for part in (rest, held_out):
    assert part.content == examples.content and part.shape == (9, 1)
    assert [int(video[0, 0]) // 100 for video in part.frames] == part.ids.tolist()
    assert [int(video[0, 0]) // 100 for video, _ in part.decode(part.ids)] == part.ids.tolist()


def test_person_in_both_streams_is_refused():
  source = data.Source({"label": np.zeros(6, int), "person": np.arange(6) // 2}, 2, groups="person")
  examples = Videos(frames(), source)
  stream = Stream(examples.take(slice(0, 3)), 2, random_clip(3, seed=0), seed=0)
  views = [
    EvalStream(examples.take(slice(n, 6)), 2, uniform_clips(3, clips=2), threads=2) for n in (3, 4)
  ]
  with pytest.raises(ValueError, match="^evaluation: .*'person'"):
    check_no_shared_groups(stream, views[0])
  check_no_shared_groups(stream, views[1])


def test_training_with_a_person_in_both_streams_raises():
  person = np.arange(18) // 2
  source = data.Source({"label": person % 2, "person": person}, 2, groups="person")
  examples = Videos([video / 1000 for video in frames(3 * LENGTHS)], source)
  with pytest.raises(ValueError, match="^evaluation: .*'person'"):
    fit(
      from_apply(None, sums, variables=jnp.float32(0.5)),
      None,
      objectives.weighted(hard=(1.0, objectives.labels())),
      optax.sgd(0.1),
      Stream(examples.take(slice(0, 9)), 8, random_clip(3, seed=0), seed=0, threads=2),
      steps=1,
      batch_size=8,
      evaluation=EvalStream(examples.take(slice(9, 18)), 8, random_clip(3, seed=0), threads=2),
    )


def test_digest_knows_frames_and_labels():
  other_frame, other_label = frames(), videos()
  other_frame[2][3] += 1
  relabeled = data.Source({"label": np.ones(6, int)}, classes=2, name="toy")
  other_label = Videos(frames(), relabeled)
  assert videos().digest == videos().digest
  assert len({videos().digest, videos(other_frame).digest, other_label.digest}) == 3
  assert other_label.content == videos().content  # A cache of outputs does not depend on labels.


NAN = np.full((5, 1), np.nan, np.float32)


@pytest.mark.parametrize(
  "arrays, text",
  [
    (frames()[:2] + [NAN], "id 2"),
    (frames()[:2] + [np.zeros((0, 1))], "id 2"),
    (frames()[:2] + [np.zeros((5, 2))], "id 2"),
    (frames()[:2] + [np.zeros((5, 8, 8, 1))], "id 2"),
    ([np.zeros((5, 8, 8), np.float32)], "id 0"),
    ([np.zeros((5, 8, 8, 1), np.int32)], "id 0"),
  ],
)
def test_bad_video_is_refused_with_its_id(arrays, text):
  with pytest.raises(ValueError, match=f"^frames: .*{text}"):
    videos(arrays)


def test_number_of_videos_is_that_of_the_examples():
  with pytest.raises(ValueError, match="^frames: .*6 examples, got 2"):
    Videos(frames()[:2], videos().examples)


def sums(w, image):
  """A teacher whose logits are the sum of a clip, and minus it."""
  total = image.sum((1, 2))
  return w * jnp.stack([total, -total], -1)


def test_cache_holds_several_clips_of_a_video(tmp_path):
  examples = videos([x / 100 for x in frames()])
  crop = random_clip(3, seed=4)
  teacher = from_apply(None, sums, variables=jnp.float32(0.5))
  codecs = {"logits": cache.Dense("float32")}
  options = {"crop": crop, "num_views": 3, "batch_size": 8, "progress": False}
  stored = cache.write_cache(tmp_path, teacher, examples, codecs, **options)
  batch = next(Stream(examples, 6, crop, seed=0, num_views=3, threads=2)(2))
  assert set(batch["view"]) == {2}
  outputs = stored.model.apply(
    *stored.model.variables, stored.add_columns(batch), train=False, key=None
  )
  np.testing.assert_allclose(outputs[0]["logits"], sums(0.5, batch["image"]), rtol=1e-6)
  part = examples.take([1, 3])
  cache.compatibility.check_run(stored, part, crop=crop, num_views=3)
  with pytest.raises(cache.Mismatch, match="crop"):
    cache.compatibility.check_run(stored, part, crop=random_clip(3, seed=5), num_views=3)
  changed = [x / 100 for x in frames()]
  changed[0] = changed[0] + 1
  with pytest.raises(cache.Mismatch, match="content"):
    cache.write_cache(tmp_path, teacher, videos(changed), codecs, **options)
