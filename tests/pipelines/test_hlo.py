"""What is read of a compiled TPU program: loops, collectives that wait or not, kernels, dearer branches."""

import pytest

from pipelines.bench.hlo import work

PROGRAM = """
HloModule step

%gathering (param_0: bf16[8,4]) -> (bf16[8,4], bf16[32,4]) {
  %param_0 = bf16[8,4]{1,0} parameter(0)
  %all-gather.1 = bf16[32,4]{1,0} all-gather(%param_0), channel_id=7, dimensions={0}
  ROOT %pair = (bf16[8,4], bf16[32,4]) tuple(%param_0, %all-gather.1)
}

%cheap (p: f32[4]) -> f32[4] {
  ROOT %fusion.1 = f32[4]{0} fusion(%p), kind=kLoop, calls=%x, backend_config={"estimated_cycles":"1"}
}

%dear (p: f32[4]) -> f32[4] {
  ROOT %fusion.2 = f32[4]{0} fusion(%p), kind=kLoop, calls=%x, backend_config={"estimated_cycles":"9"}
}

%body (carry: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %start = (bf16[8,4], bf16[32,4]) fusion(%c), calls=%gathering, backend_config={"estimated_cycles":"10"}
  %done = (bf16[8,4], bf16[32,4]) fusion(%start), calls=%gathering, backend_config={"estimated_cycles":"20"}
  %sum = f32[16]{0} all-reduce(%d), channel_id=8, to_apply=%add
  %gmm.1 = f32[8,4]{1,0} custom-call(%d), custom_call_target="tpu_custom_call"
  %branch = f32[4]{0} conditional(%e, %f, %g), branch_computations={%cheap, %dear}
  ROOT %carry = (s32[], bf16[8,4]) tuple(%i, %done)
}

%condition (carry: (s32[], bf16[8,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: bf16[8,4]) -> bf16[8,4] {
  %loop = (s32[], bf16[8,4]) while(%init), condition=%condition, body=%body
  ROOT %last = bf16[8,4]{1,0} fusion(%loop), calls=%x, backend_config={"estimated_cycles":"100"}
}
"""


def test_a_program_is_added_up():
    found = work(PROGRAM)
    assert found.cycles == 100 + 3 * (10 + 20 + 9)
    assert found.kernels == 3
    assert found.waited == 3 * 2 * 16 * 4, "an all-reduce sends everything twice"
    assert found.beside == (("7", 3 * 32 * 4 * 2),), "one collective, seen where it starts and where it ends"
    assert found.unknown == ()


def test_a_loop_of_unknown_length_is_named_and_counts_once():
    found = work(PROGRAM.replace("constant(3)", "parameter(0)"))
    assert found.cycles == 100 + 39
    assert found.unknown == ("body",)


def test_what_sparse_cores_gather_is_waited_for_where_nothing_runs_beside_it():
    gathering = (
        PROGRAM.split("\n\n")[1].replace("gathering", "elsewhere").replace("channel_id=7", "channel_id=9")
    )
    call = (
        '%sent = ((bf16[8,4], token[]), bf16[32,4]) call-start(%d, %t), async_execution_thread="sparsecore", '
    )
    program = PROGRAM.replace("%gmm.1 = ", f"{call}to_apply=%elsewhere\n  %gmm.1 = ")
    program = program.replace("%cheap (", f'{gathering}, execution_thread="sparsecore"\n\n%cheap (', 1)
    found, before = work(program), work(PROGRAM)
    assert (found.waited, found.cycles) == (before.waited, before.cycles)
    assert dict(found.beside) == dict(before.beside) | {"9": 3 * 32 * 4 * 2}
    needed = "%got = bf16[32,4] call-done(%sent)\n  "
    assert work(program.replace("%branch = ", f"{needed}%branch = ")).waited == before.waited, "a kernel runs"
    assert work(program.replace("%gmm.1 = ", f"{needed}%gmm.1 = ")).waited == before.waited + 3 * 32 * 4 * 2


def test_a_kernel_that_multiplies_nothing_is_priced_by_its_bytes():
    mover = '%heads.1 = bf16[8,4]{1,0} custom-call(%sum, %none), custom_call_target="tpu_custom_call"\n  '
    found, before = work(PROGRAM.replace("%branch = ", f"{mover}%branch = ")), work(PROGRAM)
    a_cycle = 0.5 * 1640e9 / 1.75e9
    assert found.kernels == before.kernels
    assert found.cycles == pytest.approx(before.cycles + 3 * (16 * 4 + 8 * 4 * 2) / a_cycle)


def test_what_carries_no_estimate_is_told():
    gather = "%rows.1 = bf16[8,4]{1,0} fusion(%d), kind=kCustom, calls=%x\n  "
    found = work(PROGRAM.replace("%branch = ", f"{gather}%branch = "))
    assert (found.unpriced, found.cycles) == (3 * 8 * 4 * 2, work(PROGRAM).cycles)


def test_what_a_collective_brings_is_not_told_twice():
    bare = PROGRAM.replace(', backend_config={"estimated_cycles":"20"}', "")
    found = work(bare)
    assert (found.unpriced, found.beside) == (0, work(PROGRAM).beside)
