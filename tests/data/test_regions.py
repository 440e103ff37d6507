import numpy as np
import pytest

from distill_jax import data


def a_source(groups="tile"):
  """Tiles of 8 x 8 pixels at a stride of 4 in an image of 80 x 96."""
  left, top = (x.reshape(-1) for x in np.meshgrid(np.arange(0, 89, 4), np.arange(0, 73, 4)))
  tile = np.stack([left, top, left + 8, top + 8], -1)
  return data.Source({"tile": tile, "row": top}, groups=groups)


def pixels(source):
  """Counts how many tiles show each pixel of the image."""
  image = np.zeros((80, 96), int)
  for left, top, right, bottom in source.arrays["tile"]:
    image[top:bottom, left:right] += 1
  return image


@pytest.mark.parametrize("gap", [0, 1, 5])
def test_no_tile_of_one_part_is_near_the_other(gap):
  train, test = data.split_regions(a_source(), 0.3, region=24, gap=gap)
  assert not set(train.ids) & set(test.ids)
  near = np.zeros((80, 96), bool)
  for top, left in np.argwhere(pixels(test)):
    margin = max(gap, 0)
    near[max(0, top - margin) : top + margin + 1, max(0, left - margin) : left + margin + 1] = True
  assert near.sum() > 500
  assert not (pixels(train)[near if gap else pixels(test) > 0]).any()
  # No more tiles are lost than those within the gap.
  lost = np.setdiff1d(a_source().ids, [*train.ids, *test.ids])
  for left, top, right, bottom in a_source().arrays["tile"][lost]:
    assert near[top:bottom, left:right].any()


def test_regions_are_held_out_by_position():
  source = a_source()
  train, test = data.split_regions(source, 0.3, region=24)
  some = source.take(np.r_[5:300, 2])
  assert set(data.split_regions(some, 0.3, region=24)[1].ids) == set(test.ids) & set(some.ids)
  assert set(data.split_regions(source, 0.3, region=24, seed=1)[1].ids) != set(test.ids)
  center = source.arrays["tile"][:, :2] + 4
  region = center // 24
  for number in np.unique(region, axis=0):
    rows = (region == number).all(1)
    assert (
      np.isin(source.ids[rows], test.ids).all() or not np.isin(source.ids[rows], test.ids).any()
    )


@pytest.mark.parametrize(
  "arguments, field",
  [
    ({"fraction": 1.0}, "fraction"),
    ({"fraction": "half"}, "fraction"),
    ({"region": 0}, "region"),
    ({"gap": -1}, "gap"),
    ({"region": 500}, "fraction"),
    ({"source": a_source("")}, "groups"),
    ({"source": a_source("row")}, "groups"),
    ({"source": {"tile": np.zeros((2, 4))}}, "source"),
  ],
)
def test_arguments_are_checked(arguments, field):
  with pytest.raises(ValueError, match=rf"^{field}: expected"):
    data.split_regions(**({"source": a_source(), "fraction": 0.3, "region": 24} | arguments))


def test_split_uses_the_groups_of_the_source():
  person = np.arange(60) // 6
  source = data.Source({"person": person}, groups="person")
  train, test = data.split(source, 0.3)
  assert not set(train.arrays["person"]) & set(test.arrays["person"])
  with pytest.raises(ValueError, match=r"^groups: expected integers"):
    data.split(a_source(), 0.3)


@pytest.mark.parametrize(
  "values",
  [np.zeros((3, 2), int), np.zeros(3), np.array([[0, 0, 4, 4], [4, 0, 4, 4], [0, 0, 1, 1]])],
)
def test_groups_of_a_source_are_checked(values):
  with pytest.raises(ValueError, match=r"^groups: expected"):
    data.Source({"tile": values}, groups="tile")
  with pytest.raises(ValueError, match=r"^groups: expected an entry"):
    data.Source({"tile": values}, groups="person")
