"""Communication and loops in texts of compiled programs that are counted by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from distill_jax.cost.hlo import Collective, Loop, collectives, loops


def module(*instructions, others=""):
  body = "\n".join(f"  {line}" for line in instructions)
  return f"""HloModule jit_step, is_scheduled=true, num_partitions=8
{others}
%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}}

ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
{body}
}}
"""


def parse_one(line, **others):
  [collective] = collectives(module(line, **others))
  return collective


@pytest.mark.parametrize(
  "groups, size",
  [
    ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2),
    ("replica_groups={{0,1,2,3,4,5,6,7}}", 8),
    ("replica_groups={}", 8),
    ("replica_groups=[2,4]<=[8]", 4),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
    ("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0','axis_1'}", 8),
    (
      "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_2'}",
      2,
    ),
    ("replica_groups=mesh['a'=8] {'a':(1)2}", 2),
  ],
)
def test_groups_in_every_notation(groups, size):
  attributes = f"channel_id=1, {groups}, use_global_device_ids=true, to_apply=%sum"
  line = f"%r = f32[4]{{0}} all-reduce(%x), {attributes}"
  assert parse_one(line) == Collective("all-reduce", "f32", size, 1, 16, True)


@pytest.mark.parametrize(
  "line, kind, dtype, bytes_",
  [
    ("%r = f32[] all-reduce(%x), replica_groups={{0,1}}, to_apply=%sum", "all-reduce", "f32", 4),
    (
      "%r = (bf16[3,5]{1,0:T(8,128)(2,1)S(1)}, f32[]{:T(128)}, /*index=2*/bf16[7]{0}) "
      "all-reduce(%x, %x, %x), replica_groups=[1,2]<=[2], to_apply=%sum",
      "all-reduce",
      "bf16+f32",
      30 + 4 + 14,
    ),
    (
      "%r = f32[4]{0} all-reduce-start(%x), replica_groups={{0,1}}, to_apply=%sum",
      "all-reduce",
      "f32",
      16,
    ),
    ("%r = s8[6,4] all-gather(%x), replica_groups={{0,1}}, dimensions={0}", "all-gather", "s8", 24),
    (
      "%r = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), replica_groups={{0,1}}, dimensions={0}",
      "all-gather",
      "f32",
      32,
    ),
    (
      "%r = ((f32[4], f32[2]), (f32[8], f32[4])) all-gather-start(%x, %x), "
      "replica_groups={{0,1}}, dimensions={0}",
      "all-gather",
      "f32",
      48,
    ),
    (
      "%r = f32[2] reduce-scatter(%x), replica_groups={{0,1}}, to_apply=%sum",
      "reduce-scatter",
      "f32",
      16,
    ),
    (
      "%r = pred[16] all-to-all(%x), replica_groups={{0,1}}, dimensions={0}",
      "all-to-all",
      "pred",
      16,
    ),
    (
      "%r = s4[7] collective-permute(%x), source_target_pairs={{0,1},{1,0}}",
      "collective-permute",
      "s4",
      4,
    ),
    (
      "%r = (c64[3], c64[3], u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), "
      "source_target_pairs={{0,1}}",
      "collective-permute",
      "c64",
      24,
    ),
    (
      "%r = f8e4m3fn[9] collective-broadcast(%x), replica_groups={{0,1}}",
      "collective-broadcast",
      "f8e4m3fn",
      9,
    ),
  ],
)
def test_bytes_are_those_of_the_full_arrays(line, kind, dtype, bytes_):
  assert parse_one(line) == Collective(kind, dtype, 2, 1, bytes_, True)


def test_asynchronous_calls_count_once():
  text = module(
    "%s = (f32[4], f32[8]) all-gather-start(%x), channel_id=1, replica_groups={{0,1}}, "
    "dimensions={0}",
    "%d = f32[8] all-gather-done(%s)",
    "%u = ((f32[4]), f32[2]) async-start(%x), calls=%scatter",
    "%v = ((f32[4]), f32[2]) async-update(%u), calls=%scatter",
    "ROOT %w = f32[2] async-done(%v), calls=%scatter",
    others="""
%scatter (p: f32[4]) -> f32[2] {
  %p = f32[4] parameter(0)
  ROOT %r = f32[2] reduce-scatter(%p), channel_id=2, replica_groups={{0,1}}, to_apply=%sum
}
""",
  )
  assert {(c.kind, c.calls, c.bytes) for c in collectives(text)} == {
    ("all-gather", 1, 32),
    ("reduce-scatter", 1, 16),
  }


def fused(name, line):
  return f"\n%{name} (p: f32[4]) -> f32[4] {{\n  %p = f32[4] parameter(0)\n  ROOT {line}\n}}\n"


def test_fused_copies_of_one_channel_count_once():
  # On TPUs a start, a matrix product and an end each have a copy of the collective, under one
  # channel.
  line = "%g = f32[8] all-gather(%p), channel_id=13, replica_groups=[1,2]<=[2], dimensions={0}"
  text = module(
    *(f"%f{i} = f32[8] fusion(%x), kind=kCustom, calls=%part.{i}" for i in range(3)),
    others="".join(fused(f"part.{i}", line) for i in range(3)),
  )
  assert collectives(text) == (Collective("all-gather", "f32", 2, 1, 32, True),)


def test_fused_all_reduce_of_a_part_is_a_reduce_scatter():
  line = "%r = f32[4] all-reduce(%p), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%sum"
  text = module(
    "%f = f32[2] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3",
    others=fused("all-reduce-scatter.3", line),
  )
  assert collectives(text) == (Collective("reduce-scatter", "f32", 2, 1, 16, True),)


def loop(
  name,
  condition,
  attributes="",
  inside="%r = f32[4] all-reduce(%p), replica_groups={}, to_apply=%sum",
):
  """A loop over f32[4], and the instruction that runs it."""
  other = (
    fused(f"{name}.body", inside)
    + f"\n%{name}.condition (p: f32[4]) -> pred[] {{\n{condition}\n}}\n"
  )
  return (
    other,
    f"%{name} = f32[4] while(%p), condition=%{name}.condition, body=%{name}.body{attributes}",
  )


def counted(direction, limit, operands="%i, %n"):
  return f"""  %p = f32[4] parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[]{{:T(128)}} constant({limit})
  ROOT %c = pred[] compare({operands}), direction={direction}"""


UNKNOWN = (
  '  %p = f32[4] parameter(0)\n  ROOT %c = pred[] custom-call(%p), custom_call_target="more"'
)


@pytest.mark.parametrize(
  "condition, attributes, trips",
  [
    (counted("LT", 6), "", 6),
    (UNKNOWN, ', backend_config={"known_trip_count":{"n":"5"},"other":1}', 5),
    (UNKNOWN, "", None),
    (counted("NE", 6), "", None),
    (counted("LT", 6, "%n, %i"), "", None),
    (counted("LT", -6), "", None),
  ],
)
def test_trips_of_a_loop(condition, attributes, trips):
  other, line = loop("while.1", condition, attributes)
  text = module(line.replace("(%p)", "(%x)"), others=other)
  assert loops(text) == (Loop(trips, 0),)
  [collective] = collectives(text)
  assert collective == Collective(
    "all-reduce", "f32", 8, trips or 1, 16 * (trips or 1), trips is not None
  )


def test_nested_loops_multiply_and_fusions_have_products():
  product = "%r = f32[4] fusion(%p), kind=kOutput, calls=%fused"
  inner, line = loop("inner", counted("LT", 3), inside=product)
  outer, outer_line = loop("outer", counted("LT", 4), inside=line)
  dot = "%d = f32[4] convolution(%p, %p), dim_labels=b0f_0io->b0f"
  reduced = fused("fused", dot).replace(
    "ROOT", "%r = f32[4] all-reduce(%p), replica_groups={{0,1}}, to_apply=%sum\n  ROOT"
  )
  text = module(outer_line.replace("(%p)", "(%x)"), others=reduced + inner + outer)
  assert set(loops(text)) == {Loop(4, 1), Loop(3, 1)}
  assert collectives(text) == (Collective("all-reduce", "f32", 2, 12, 12 * 16, True),)


def test_both_branches_of_a_conditional_count():
  line = "%r = f32[4] all-reduce(%p), replica_groups={{0,1}}, to_apply=%sum"
  text = module(
    "%c = f32[4] conditional(%x, %x, %x), branch_computations={%one, %two}",
    others=fused("one", line) + fused("two", line),
  )
  assert collectives(text) == (Collective("all-reduce", "f32", 2, 2, 32, True),)


def test_equal_collectives_add_up_in_the_order_of_bytes():
  line = "= {} all-reduce(%x), replica_groups={{{{0,1}}}}, to_apply=%sum"
  text = module(
    *(f"%r{i} {line.format(t)}" for i, t in enumerate(("f32[4]", "bf16[20]", "f32[2]")))
  )
  assert [(c.dtype, c.calls, c.bytes) for c in collectives(text)] == [
    ("bf16", 1, 40),
    ("f32", 2, 24),
  ]


def test_other_text_raises():
  with pytest.raises(ValueError, match=r"^text: "):
    collectives("func.func public @main() { return }")


def test_compiled_program_has_the_traffic_of_its_code(mesh):
  def step(x):  # x: f32[6] of each of 8 devices
    total = jax.lax.fori_loop(0, 5, lambda i, s: s + jax.lax.psum(s * x[0], "data"), jnp.zeros(10))
    parts = jax.lax.psum_scatter(jnp.tile(x[:1], 16), "data", tiled=True)
    turned = jax.lax.all_to_all(jnp.tile(x[:1], 8), "data", 0, 0, tiled=True)
    return (
      total,
      jax.lax.all_gather(x, "data"),
      parts,
      turned,
      jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]),
    )

  mapped = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), check_vma=False)
  text = jax.jit(mapped(step, out_specs=P("data"))).lower(jnp.ones(48)).compile().as_text()
  by_kind = {c.kind: c for c in collectives(text)}
  assert by_kind.pop("all-reduce") == Collective("all-reduce", "f32", 8, 5, 5 * 40, True)
  assert by_kind.pop("all-gather") == Collective("all-gather", "f32", 8, 1, 8 * 24, True)
  assert by_kind.pop("reduce-scatter") == Collective("reduce-scatter", "f32", 8, 1, 64, True)
  assert by_kind.pop("all-to-all").bytes == 32
  assert by_kind.pop("collective-permute") == Collective(
    "collective-permute", "f32", 2, 1, 24, True
  )
  assert not by_kind


def test_compiled_scan_has_its_trips_and_products():
  def step(w, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]

  text = jax.jit(step).lower(jnp.ones((7, 300, 300)), jnp.ones((200, 300))).compile().as_text()
  assert [loop.trips for loop in loops(text) if loop.products] == [7]
