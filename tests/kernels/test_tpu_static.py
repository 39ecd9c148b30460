"""Static counts of the TPU kernels: loops found in a schedule, and the bundles of ours."""

import pytest

from benchmarks import tpu_static
from benchmarks.kernels import schedule as bench_schedule
from benchmarks.kernels.schedule import Loop

SCHEDULE = """
LB: loop body
   0x3   :  { %1 = smov 0 } /* Start region 1 */
   0x5 LB: > { %2 = smov 1 } /* Start region 2 */
   0x8 LB: >> { %3 = smov 2 } /* Start region 3 */
   0x9   : >> { %4 = vadd.f32 %v1, %v2 }
   0xb   : >> { %5 = sbr.rel (!%p1) target = $region3 }
  0x12   : > { %6 = sbr.rel (%p2) target = $region1 }
  0x14   : > { %7 = sbr.rel (!%p3) target = $region2 }
"""


def test_loops_are_branches_back():
    loops = bench_schedule.loops_of(SCHEDULE)
    assert loops == [Loop(0x5, 0x19), Loop(0x8, 0x10)]
    assert bench_schedule.own_bundles(loops) == [0x14 - 8, 8]


def test_a_head_is_its_loops_times_their_trips():
    """Eight blocks: 28 full, 8 partial on the diagonal; two heads share the rotation of keys."""
    loops = [Loop(0, 1000), *(Loop(at, at + 10) for at in (100, 200, 300))]
    own = bench_schedule.by_loop("forward", loops)
    assert own == {"program": 970, "rotate_k": 10, "full": 10, "partial": 10}
    whole = bench_schedule.Blocks(2, 8, 1, (1, 1))
    assert bench_schedule.per_head("forward", own, whole) == 8 * 970 + 4 * 10 + 28 * 10 + 8 * 10
    streamed = bench_schedule.by_loop("forward", loops[:-1])
    assert list(streamed) == ["program", "full", "partial"]
    parts = whole._replace(forward=2)
    assert bench_schedule.per_head("forward", streamed, parts) == 16 * 980 + 36 * 10


def test_a_head_of_splash_is_the_blocks_of_a_triangle():
    kernels = {"fwd": [Loop(0, 100)], "dkv": [Loop(5, 205)]}
    count = tpu_static.splash(kernels)
    assert (count["forward"], count["backward"]) == (10 * 100, 10 * 200)


def test_a_kernel_of_other_loops_is_not_counted():
    with pytest.raises(ValueError, match="forward kernel: 1 loops, expected"):
        tpu_static.ours({"rotary_attention_forward": [Loop(0, 9)]})


def test_our_kernels_are_no_slower_than_they_were():
    """Llama 3 8B's heads, T = 4096, v5p; splash's backward takes 110k, its separate ones 146k."""
    pytest.importorskip("libtpu", reason="needs libtpu")
    count = tpu_static.ours(tpu_static.schedules("ours"))
    assert count["forward"] < 51_000
    assert count["backward"] < 92_000
