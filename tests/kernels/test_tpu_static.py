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


WHOLE = bench_schedule.Blocks("v5p", 4096, 128, 2, 1, 512, 512, 1, (1, 1))


def test_a_head_is_its_loops_times_their_trips():
    """Eight blocks: 28 full, 8 partial on the diagonal; two heads share the rotation of keys."""
    loops = [Loop(0, 1000), *(Loop(at, at + 10) for at in (100, 200, 300))]
    own = bench_schedule.by_loop("forward", loops)
    assert own == {"program": 970, "rotate_k": 10, "full": 10, "partial": 10}
    assert bench_schedule.per_head("forward", own, WHOLE) == 8 * 970 + 4 * 10 + 28 * 10 + 8 * 10
    streamed = bench_schedule.by_loop("forward", loops[:-1])
    assert list(streamed) == ["program", "full", "partial"]
    parts = WHOLE._replace(forward=2)
    assert bench_schedule.per_head("forward", streamed, parts) == 16 * 980 + 36 * 10
    # Two heads together, in blocks of 256 queries: 16 programs; 56 full steps and 16 partial ones.
    pair = WHOLE._replace(G=4, heads=2, block_q=256)
    want = (16 * 970 + 8 * 10 / 2 + 56 * 10 + 16 * 10) / 2
    assert bench_schedule.per_head("forward", own, pair) == want


def test_a_step_takes_its_bundles_or_its_products():
    """Five products of 512 x 512 x 128 take 2,560 cycles of a v5p; of a v6e half of the unit."""
    own = dict(program=1242, full=2198, partial=2700)
    count = bench_schedule.count_head("backward", own, WHOLE)
    assert count["bundles"] == 1242 + 28 * 2198 + 8 * 2700
    assert count["mxu_floor"] == 36 * 2560
    assert count["at_least"] == 1242 + 28 * 2560 + 8 * 2700
    assert bench_schedule.mxu_floor("v6e", 5, 512 * 512, 128) == 1280
    assert bench_schedule.mxu_floor("v6e", 5, 512 * 512, 256) == 1280
    assert bench_schedule.mxu_floor("v5p", 5, 512 * 512, 64) == 2560


def test_a_head_of_splash_is_the_blocks_of_a_triangle():
    kernels = {"fwd": [Loop(0, 5000)], "dkv": [Loop(5, 205)]}
    count = tpu_static.splash("v5p", "splash_fused", kernels)
    forward, backward = (count[way]["at_least"] for way in ("forward", "backward"))
    assert (forward, count["backward"]["bundles"]) == (10 * 5000, 10 * 200)
    assert backward == count["backward"]["mxu_floor"] == 10 * 4 * 2560


def test_the_printed_line_states_the_floor():
    count = dict(loops={}, bundles=91296, mxu_floor=92160, at_least=102501)
    assert tpu_static.line("v5p", "ours", "backward", count) == (
        "v5p   ours         backward at least 102,501 cycles per head "
        "(bundles 91,296, floor of the matrix unit 92,160)"
    )


def test_a_kernel_of_other_loops_is_not_counted():
    with pytest.raises(ValueError, match="forward kernel: 1 loops, expected"):
        tpu_static.ours({"rotary_attention_forward": [Loop(0, 9)]}, WHOLE)


@pytest.mark.parametrize(
    ("chip", "forward", "backward"), [("v5p", 51_000, 92_000), ("v6e", 32_500, 57_000)]
)
def test_our_kernels_are_no_slower_than_they_were(chip, forward, backward):
    """Bundles of a head of Llama 3 8B at T = 4096."""
    pytest.importorskip("libtpu", reason="needs libtpu")
    count = tpu_static.counted(chip, ("ours",))["ours"]
    assert count["forward"]["bundles"] < forward
    assert count["backward"]["bundles"] < backward
