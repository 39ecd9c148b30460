"""Counts of FLOPs, bytes and collectives in the text of optimized HLO."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.plan import hlo
from llama_jax.plan.hlo_text import first_group


def compiled_text(function, *shapes):
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return jax.jit(function).lower(*args).compile().as_text()


def test_flops_count_once_per_loop_iteration():
    def inner(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0]

    def outer(x, w):
        return jax.lax.scan(lambda x, _: (inner(x, w) + 1, None), x, length=5)[0]

    cost = hlo.count(compiled_text(outer, (16, 32), (32, 32)))
    assert cost.flops == 5 * 7 * 2 * 16 * 32 * 32


UNROLLED = """
%cond (p: (s32[], f32[4,4])) -> pred[] {
  %p = (s32[], f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(10)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
%body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[], f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[4,4]{1,0}) tuple(%next, %y)
}
ENTRY %main (a: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %a = (s32[], f32[4,4]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[4,4]{1,0}) while(%a), condition=%cond, body=%body
}
"""


def test_a_loop_unrolled_by_two():
    """From 0 to 10 in steps of 2: five iterations, each with a sum and a product."""
    assert hlo.count(UNROLLED).flops == 5 * 2 * 4 * 4 * 4
    assert hlo.count(UNROLLED).launches == 5 * 2


def test_flops_of_every_form_of_matmul():
    forms = [
        (lambda a, b: jnp.einsum("bmk,bkn->bmn", a, b), (5, 7, 11), (5, 11, 13), 5 * 7 * 11 * 13),
        (lambda a, b: jnp.einsum("mk,nk->nm", a, b), (7, 11), (13, 11), 7 * 11 * 13),
        (lambda a, b: jnp.einsum("mjk,jkn->mn", a, b), (7, 3, 11), (3, 11, 13), 7 * 33 * 13),
        (lambda a, b: jnp.einsum("abmk,abnk->abmn", a, b), (2, 3, 7, 5), (2, 3, 9, 5), 6 * 315),
    ]
    for function, left, right, products in forms:
        assert hlo.count(compiled_text(function, left, right)).flops == 2 * products


def test_a_matmul_that_the_tpu_compiler_writes_as_a_convolution():
    line = (
        "ENTRY %main (a: f32[4,8,16]) -> f32[4,8,32] {\n"
        "  %a = f32[4,8,16]{2,1,0:T(8,128)} parameter(0)\n"
        "  %b = f32[4,16,32]{2,1,0:T(8,128)} parameter(1)\n"
        "  ROOT %c = f32[4,8,32]{2,1,0:T(8,128)} convolution(%a, %b), window={size=4 stride=3 "
        'pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf, backend_config={"estimated_cycles":"77"}\n'
        "}\n"
    )
    cost = hlo.count(line)
    assert (cost.flops, cost.cycles, cost.matmul_cycles) == (2 * 4 * 8 * 16 * 32, 77, 77)


def test_collectives_count_the_bytes_of_whole_arrays():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, P("a", "b")))

        run = jax.shard_map(
            lambda x: jax.lax.scan(
                lambda x, _: (
                    x + jnp.sum(jax.lax.all_gather(x, "b", axis=1, tiled=True))
                    + jax.lax.psum(x, "a"),
                    None,
                ),
                x, length=3,
            )[0],
            out_specs=P("a", "b"), check_vma=False,
        )  # fmt: skip
        cost = hlo.count(jax.jit(run).lower(x).compile().as_text())
    found = {(c.kind, c.group): size for c, size in cost.collectives.items()}
    # Three iterations: each device has 4 x 16 of 8 x 64 values, a row of the mesh 4 x 64.
    assert found == {
        ("all-gather", (0, 1, 2, 3)): 3 * 4 * 64 * 4,
        ("all-reduce", (0, 4)): 3 * 4 * 16 * 4,
    }


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", (0, 4)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", tuple(range(8))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1':(2)2}", (0, 1)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1':(1)2}", (0, 2)),
        ("source_target_pairs={{3,1},{1,3}}", (3, 1)),
        ("replica_groups={}", ()),
    ],
)
def test_device_groups_in_every_notation(text, group):
    assert first_group(f"%x = f32[8] all-reduce(%y), {text}, to_apply=%add") == group
