"""Advice against injected causes: each is named, with its size, and nothing is said of a clean step."""

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from pages import anchors
from synthetic import Meeting, simulate

from meshwright.account import MeasuredStep, MemoryAccount, StepAccount, Transfer
from meshwright.explain import Advice
from meshwright.explain.advice import CAUSES, give_advice
from meshwright.explain.case import build_case
from meshwright.explain.steps import resolve_steps
from meshwright.record import Gap, GroupTransfers, HostCause, KernelGroup, Step, StepDetail
from meshwright.spec import Device
from meshwright.spec.devices import NODES

WORLD = 4
WORK_S = 0.27
DETAIL = StepDetail(launches=2000, kernel_s=120e-6)
H200 = NODES["h200"].device

# What a rank loses before its first collective, by cause: a bucket of the account, or why its host was late.
Lost = Mapping[int, Mapping[str, float]]
HOST_CAUSES = ("synchronize", "launch", "collect", "python")
EVERYWHERE = range(WORLD)


def steps_of(lost: Lost, *, step: int = 5, world: int = WORLD, detail: StepDetail = DETAIL) -> dict[int, Step]:
    """A step of 0.3 s; what each rank loses, it loses before it meets the others. Half of the work lies behind that."""
    group = tuple(range(world))
    late = {rank: sum(causes.values()) for rank, causes in lost.items()}
    meetings = [Meeting("shard", group, WORK_S / 2, 0.006, late), Meeting("control", group, WORK_S / 2, 0.002)]
    lines: dict[int, Step] = {}
    for one in simulate(world, meetings):
        causes = dict(lost.get(one.rank, {}))
        slow = causes.pop("slow", 0.0)
        host: dict[HostCause, float] = {cause: causes.pop(cause) for cause in HOST_CAUSES if cause in causes}
        work = StepAccount(useful=0.1, inefficiency=WORK_S - 0.12 + slow - one.account.inefficiency, optimizer=0.015)
        account = one.account + work + StepAccount(host=0.003 + sum(host.values()), input=0.001, contention=0.001)
        for bucket, seconds in causes.items():
            account = account + StepAccount(**{bucket: seconds})
        host["launch"] = host.get("launch", 0.0) + 0.003
        measured = msgspec.structs.replace(one, step=step, account=account)
        assert account.total() == pytest.approx(one.wall_s)
        lines[one.rank] = Step(measured=measured, detail=msgspec.structs.replace(detail, host=host))
    return lines


def advice_on(*steps: Mapping[int, Step], kind: str = "cuda", **known: object) -> tuple[Advice, ...]:
    events = {rank: [step[rank] for step in steps] for rank in steps[0]}
    return give_advice(build_case(resolve_steps(events), kind=kind, **known))  # pyright: ignore[reportArgumentType]


def sizes(found: tuple[Advice, ...]) -> dict[str, float | None]:
    return {advice.cause: advice.gain_s for advice in found}


def everywhere(**lost: float) -> Lost:
    return dict.fromkeys(EVERYWHERE, lost)


# --- What is clean stays clean --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_clean_step_raises_nothing(kind: str, world: int) -> None:
    assert advice_on(steps_of({}, world=world), kind=kind, device=H200) == ()


def test_what_is_too_small_is_not_named() -> None:
    for cause in ("input", "synchronize", "launch", "collect", "python", "slow", "checkpoint"):
        assert advice_on(steps_of({1: {cause: 0.005}})) == ()
        assert sizes(advice_on(steps_of({1: {cause: 0.02}}))).keys() != set()


def test_ranks_that_differ_as_clean_ranks_do_raise_nothing() -> None:
    jitter = {0: {"slow": 0.003}, 1: {"launch": 0.002, "input": 0.001}, 2: {"python": 0.004}, 3: {"synchronize": 0.001}}
    assert advice_on(steps_of(jitter)) == ()


# --- One cause ------------------------------------------------------------------------------------------------------

BY_CAUSE = {
    "input": "input",
    "checkpoint": "checkpoint",
    "synchronize": "synchronize",
    "collect": "collect",
    "launch": "launch",
    "python": "unexplained",
    "other": "unexplained",
}


@pytest.mark.parametrize("size", [0.012, 0.05, 0.4])
@pytest.mark.parametrize("cause", BY_CAUSE)
def test_a_cause_on_all_ranks_is_charged_once(cause: str, size: float) -> None:
    found = advice_on(steps_of(everywhere(**{cause: size})))
    extra = 0.003 if cause == "launch" else 0.001 if cause == "input" else 0.0
    assert sizes(found) == {BY_CAUSE[cause]: pytest.approx(size + extra)}
    assert "on rank" not in found[0].what


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("cause", ["input", "checkpoint", "synchronize", "collect"])
def test_a_cause_on_one_rank_is_named_there_and_is_no_straggler(cause: str, rank: int) -> None:
    """The others wait for that rank as long: the same seconds, lost once."""
    found = advice_on(steps_of({rank: {cause: 0.05}}))
    assert sizes(found) == {cause: pytest.approx(0.05, rel=0.1)}
    assert f"on rank {rank}" in found[0].what + found[0].evidence


@pytest.mark.parametrize(
    ("part", "words"),
    [("slow", "forward and backward kernels"), ("launch", "launching work"), ("python", "its host, in no operator")],
)
def test_a_slow_rank_is_named_with_what_takes_longer_there(part: str, words: str) -> None:
    found = advice_on(steps_of({2: {part: 0.05}}))
    assert sizes(found) == {"straggler": pytest.approx(0.05)}
    assert "Rank 2 is slower" in found[0].what and f"50.0 ms by {words}" in found[0].evidence


def test_a_rank_whose_thread_was_off_its_core_is_contended_and_not_slow() -> None:
    found = advice_on(steps_of({2: {"contention": 0.05}}), kind="cpu")
    assert sizes(found) == {"contention": pytest.approx(0.05, rel=0.1)}


def test_transfers_that_a_slow_rank_hides_and_the_others_cannot_are_lost_to_it() -> None:
    """The fast rank waits 40 ms, and sees 8 ms more of transfers, which run beside the slow rank's longer kernels."""
    waiting = ((0.1, 0.14), (0.14, 0.151))
    rank_0 = StepAccount(useful=0.1, comm_replica=0.051)
    rank_1 = StepAccount(useful=0.1, inefficiency=0.048, comm_replica=0.003)
    one = MeasuredStep(step=1, rank=0, host="a", start_s=0.0, end_s=0.151, account=rank_0)
    sent = Transfer(purpose="replica", ranks=(0, 1), index=0, start_s=0.1, end_s=0.151, exposed=waiting)
    late = Transfer(purpose="replica", ranks=(0, 1), index=0, start_s=0.14, end_s=0.151, exposed=((0.148, 0.151),))
    hidden = msgspec.structs.replace(one, rank=1, account=rank_1, overlapped={"replica": 0.008}, transfers=(late,))
    steps = {0: msgspec.structs.replace(one, transfers=(sent,)), 1: hidden}
    detail = StepDetail(host={})
    found = advice_on({rank: Step(measured=step, detail=detail) for rank, step in steps.items()})
    assert sizes(found) == {"straggler": pytest.approx(0.048)}
    # Where nothing of it runs beside kernels there, the transfers are needed by both.
    steps[1] = msgspec.structs.replace(hidden, overlapped={})
    found = advice_on({rank: Step(measured=step, detail=detail) for rank, step in steps.items()})
    assert sizes(found) == {"straggler": pytest.approx(0.04)}


@pytest.mark.parametrize("lost", [everywhere(launch=0.05), {2: {"launch": 0.05}}])
def test_what_profiling_adds_to_launching_is_no_gain(lost: Lost) -> None:
    """The other steps were 40 ms shorter: launching costs them 10 (and the 3 of a clean step), others cost as much."""
    step = steps_of({rank: {**lost.get(rank, {}), "input": 0.02} for rank in EVERYWHERE})
    whole_s = step[0].measured.wall_s
    cause = "straggler" if len(lost) == 1 else "launch"
    found = sizes(advice_on(step, step_s=whole_s - 0.04))
    rest = {"input": pytest.approx(0.02, rel=0.1)}
    assert found == rest | {cause: pytest.approx(0.013 if cause == "launch" else 0.013 * 50 / 53, abs=1e-6)}
    assert sizes(advice_on(step, step_s=whole_s + 0.04))[cause] == pytest.approx(0.05, rel=0.1)
    # On a CPU profiling makes operators slower, too.
    assert sizes(advice_on(step, kind="cpu", step_s=whole_s - 0.04))[cause] == pytest.approx(0.05, rel=0.1)


def test_ranks_that_are_late_in_turn_are_not_accused_one_by_one() -> None:
    found = advice_on(*(steps_of({rank: {"slow": 0.05}}, step=rank) for rank in EVERYWHERE))
    assert sizes(found) == {"straggler": pytest.approx(0.05)}
    assert "late in turn" in found[0].what and "ranks 0, 1, 2, 3" in found[0].evidence


def test_a_cause_of_some_steps_counts_by_its_mean() -> None:
    found = advice_on(steps_of({}), steps_of({1: {"collect": 0.1}}, step=6))
    assert sizes(found) == {"collect": pytest.approx(0.05)}


def test_a_rank_that_waits_anyway_gains_nothing() -> None:
    """Rank 3 has 60 ms less to do than its peers: its late input costs the step nothing."""
    found = advice_on(steps_of({**{rank: {"slow": 0.06} for rank in (0, 1, 2)}, 3: {"input": 0.05}}))
    assert "input" not in sizes(found)


# --- Two causes at once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes_s", [(0.05, 0.05), (0.08, 0.03), (0.03, 0.08)])
@pytest.mark.parametrize(
    ("one", "two"),
    [("input", "synchronize"), ("input", "slow"), ("synchronize", "slow"), ("collect", "launch"), ("input", "python")],
)
def test_two_causes_are_both_named_with_their_sizes(one: str, two: str, sizes_s: tuple[float, float]) -> None:
    names = {**BY_CAUSE, "slow": "straggler"}
    here = {names[one]: sizes_s[0], names[two]: sizes_s[1]}
    wants = {cause: pytest.approx(seconds, rel=0.1, abs=0.0035) for cause, seconds in here.items()}
    if two != "slow":
        # Both on all ranks, or both late on the same one.
        assert sizes(advice_on(steps_of(everywhere(**{one: sizes_s[0], two: sizes_s[1]})))) == wants
    if two in ("slow", "synchronize"):
        assert sizes(advice_on(steps_of({1: {one: sizes_s[0], two: sizes_s[1]}}))) == wants
    # One of all ranks, one of a single rank.
    mixed = {rank: {one: sizes_s[0], **({two: sizes_s[1]} if rank == 1 else {})} for rank in EVERYWHERE}
    if two in ("slow", "synchronize"):
        found = advice_on(steps_of(mixed))
        assert sizes(found) == wants
        assert [advice.gain_s for advice in found] == sorted((advice.gain_s or 0 for advice in found), reverse=True)


def test_a_cause_hidden_behind_another_ranks_is_named_too() -> None:
    """Rank 1 is late by its input, rank 2 by less and for another reason: without the first, the second remains."""
    found = advice_on(steps_of({1: {"input": 0.06}, 2: {"synchronize": 0.03}}))
    assert sizes(found) == {"input": pytest.approx(0.06, rel=0.1), "synchronize": pytest.approx(0.03, rel=0.1)}


def test_a_late_rank_of_one_group_holds_up_the_other() -> None:
    """Rank 3 reads late; 2 waits for it in their shard group, 0 and 1 for them in their replica groups."""
    meetings = [
        Meeting("shard", (0, 1), 0.2, 0.001),
        Meeting("shard", (2, 3), 0.2, 0.001, {3: 0.05}),
        Meeting("replica", (0, 2), 0.1, 0.001),
        Meeting("replica", (1, 3), 0.1, 0.001),
    ]
    lines = {one.rank: Step(measured=one) for one in simulate(4, meetings)}
    late = lines[3].measured
    account = late.account + StepAccount(inefficiency=-0.05, input=0.05)
    lines[3] = Step(measured=msgspec.structs.replace(late, account=account))
    assert sizes(advice_on(lines)) == {"input": pytest.approx(0.05)}


# --- What a layout costs ----------------------------------------------------------------------------------------------


def alone(account: StepAccount, detail: StepDetail = DETAIL) -> dict[int, Step]:
    """A step of two ranks that wait for nothing."""
    one = MeasuredStep(step=1, rank=0, host="a", start_s=0.0, end_s=account.total(), account=account)
    return {rank: Step(measured=msgspec.structs.replace(one, rank=rank), detail=detail) for rank in range(2)}


@pytest.mark.parametrize(
    ("bucket", "cause"),
    [
        *((f"comm_{purpose}", f"exposed {purpose}") for purpose in ("replica", "shard", "tensor", "context", "expert")),
        ("comm_control", "exposed control"),
        ("optimizer", "optimizer"),
        ("contention", "contention"),
        ("bubble", "bubble"),
    ],
)
def test_what_a_layout_costs_is_named_where_it_is_much(bucket: str, cause: str) -> None:
    found = advice_on(alone(StepAccount(useful=0.5, **{bucket: 0.1})))
    assert sizes(found) == {cause: pytest.approx(0.1)}
    assert advice_on(alone(StepAccount(useful=0.5, **{bucket: 0.04}))) == ()


def test_exposed_transfers_say_which_group_carried_what() -> None:
    group = GroupTransfers(
        group="mesh_fsdp", ranks=(0, 1), purpose="shard", count=34, sent_bytes=2e9, exposed_s=0.1, overlapped_s=0.02
    )
    detail = msgspec.structs.replace(DETAIL, groups=(group,))
    (advice,) = advice_on(alone(StepAccount(useful=0.5, comm_shard=0.1), detail))
    assert "34 a step in mesh_fsdp of 2 ranks, 2.00 GB sent by each" in advice.evidence


def test_unequal_stages_gain_what_equal_ones_would() -> None:
    """Rank 0 waits 0.1 s for rank 1: equal parts would take half of that from the busier one."""
    first, second = StepAccount(useful=0.4, imbalance=0.1), StepAccount(useful=0.5)
    lines = alone(second)
    lines[0] = alone(first)[0]
    (advice,) = advice_on(lines)
    assert (advice.cause, advice.gain_s) == ("imbalance", pytest.approx(0.05))


def test_recomputing_is_named_only_where_memory_has_room() -> None:
    step = alone(StepAccount(useful=0.5, recompute=0.1))
    assert sizes(advice_on(step, device=H200, memory=MemoryAccount(activations=4e10))) == {
        "recompute": pytest.approx(0.1)
    }
    assert advice_on(step, device=H200, memory=MemoryAccount(activations=1.3e11)) == ()
    assert advice_on(step, device=None, memory=MemoryAccount(activations=1e9)) == ()


@pytest.mark.parametrize(
    ("kernel", "slow"),
    [
        ("ampere_sgemm_128x64_tn", True),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize128x64x8_stage3", True),
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x64x8_stage3", False),
        ("nvjet_tst_192x192_64x4_1x2_h_bz_coopA_NNT", False),
        ("Cijk_Ailk_Bljk_SB_MT128x128x16", True),
        ("Cijk_Ailk_Bljk_BBS_BH_MT128x128x16", False),
    ],
)
def test_single_precision_is_told_by_the_kernels(kernel: str, slow: bool) -> None:
    kernels = (KernelGroup(purpose="matrix products", seconds=0.3, count=400, busiest=kernel),)
    found = advice_on(alone(StepAccount(useful=0.5), msgspec.structs.replace(DETAIL, kernels=kernels)), device=H200)
    faster = 1 - H200.peak_fp32_flops_per_s / H200.peak_bf16_flops_per_s
    assert sizes(found) == ({"precision": pytest.approx(0.3 * faster)} if slow else {})


def test_what_nobody_can_size_comes_last() -> None:
    unknown = msgspec.structs.replace(H200, peak_bf16_flops_per_s=0.0, peak_fp32_flops_per_s=0.0)
    kernels = (KernelGroup(purpose="matrix products", seconds=0.3, count=400, busiest="ampere_sgemm_128x64_tn"),)
    account = StepAccount(useful=0.5, input=0.05)
    found = advice_on(alone(account, msgspec.structs.replace(DETAIL, kernels=kernels)), device=unknown)
    assert list(sizes(found).items()) == [("input", pytest.approx(0.05)), ("precision", None)]


# --- What the record says beyond the account --------------------------------------------------------------------------


def test_tiny_kernels_call_for_larger_microbatches() -> None:
    tiny = StepDetail(launches=20_000, kernel_s=7e-6)
    (advice,) = advice_on(steps_of(everywhere(launch=0.2), detail=tiny))
    assert advice.cause == "microbatch" and advice.gain_s == pytest.approx(0.203)
    assert "20,000 launches" in advice.evidence and "7 us" in advice.evidence


def test_the_synchronising_operator_is_named() -> None:
    gaps = (
        Gap(start_s=0.0, seconds=0.01, bucket="input", doing="enumerate(DataLoader)", before="embedding"),
        Gap(start_s=0.1, seconds=0.008, bucket="host", doing="aten::item", before="void gemm<float, 3>(int*)"),
    )
    detail = msgspec.structs.replace(DETAIL, gaps=gaps)
    (advice,) = advice_on(steps_of(everywhere(synchronize=0.05), detail=detail))
    assert "aten::item" in advice.what and "8.0 ms in aten::item before gemm" in advice.evidence


def test_asking_the_driver_for_memory_is_not_launching() -> None:
    gaps = (Gap(start_s=0.1, seconds=0.05, bucket="host", doing="cudaMalloc", before="gemm"),)
    memory = MemoryAccount(activations=1.2e11, fragmentation=1.5e10)
    steps = steps_of(everywhere(launch=0.05), detail=msgspec.structs.replace(DETAIL, gaps=gaps))
    (advice,) = advice_on(steps, device=H200, memory=memory)
    assert (advice.cause, advice.gain_s) == ("memory", pytest.approx(0.05))
    assert "135 GB at the fullest moment" in advice.evidence and "cudaMalloc" in advice.evidence


def test_what_nothing_explains_is_said_with_its_largest_gaps() -> None:
    gaps = tuple(Gap(start_s=i / 10, seconds=0.03 - i / 100, bucket="host", doing="", before="gemm") for i in range(3))
    found = advice_on(steps_of(everywhere(python=0.06), detail=msgspec.structs.replace(DETAIL, gaps=gaps)))
    (advice,) = found
    assert advice.cause == "unexplained" and advice.gain_s == pytest.approx(0.06)
    assert "30.0 ms in no operator before gemm" in advice.evidence


def test_a_host_that_the_record_says_nothing_of_is_no_guess() -> None:
    lines = {
        rank: msgspec.structs.replace(line, detail=None) for rank, line in steps_of(everywhere(launch=0.1)).items()
    }
    (advice,) = advice_on(lines)
    assert advice.cause == "host" and "does not say" in advice.what


def test_every_cause_is_documented() -> None:
    headings = anchors(Path(__file__).parents[1] / "docs" / "advice.md")
    for cause in CAUSES:
        for name in cause.names:
            assert name.replace(" ", "-") in headings, name
    found = advice_on(steps_of(everywhere(input=0.1)))
    assert re.fullmatch(r"advice\.md#input", found[0].where)


def test_a_device_of_a_job_is_enough_to_know_its_precision() -> None:
    device: Device = H200
    found = advice_on(alone(StepAccount(useful=0.5), StepDetail()), device=device, precision="fp32")
    assert sizes(found) == {"precision": None}
