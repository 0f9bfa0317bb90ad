"""What holds a step up beside its work: late input, a host that comes too late, ranks that are slower than others."""

import re

from meshwright.account import CLOSING_TOLERANCE
from meshwright.explain.case import Case, advise, compared, idle_words, on_ranks
from meshwright.explain.explanation import Advice
from meshwright.explain.lateness import ALLOCATION
from meshwright.explain.words import bytes_text, of_step, ranks_text, seconds_text

# Where the second rank is waited for this much of what the first is, naming only the first would accuse it wrongly.
IN_TURN = 0.6
# Eager PyTorch takes its host around 10 us an operator: kernels shorter than twice that leave it no lead.
TINY_KERNEL_S = 20e-6
# Operators that hand a value of the device to Python or to the host, and the calls in which they wait for it.
BLOCKING = re.compile(
    r"item\b|_local_scalar_dense|nonzero|is_nonzero|equal\b|unique|masked_select|tolist|_to_copy|copy_|Memcpy|ynchronize"
)

# Above these shares of a step, time that nothing explains is said to be lost.
UNEXPLAINED = {"python": 0.03, "other": CLOSING_TOLERANCE}

# A slow rank's parts, in words.
PARTS = {
    "compute": "forward and backward kernels",
    "recompute": "recomputing",
    "optimizer": "the optimizer",
    "launch": "launching work",
    "python": "its host, in no operator",
    "host": "its host",
    "transfers": "exposed transfers",
    "other": "time that nothing explains",
}


def late_input(case: Case) -> Advice:
    """The next batch was not there when it was needed."""
    lost = case.lost_by("input")
    ahead = "put on the devices ahead (jax.device_put)" if case.jax else "pinned memory"
    what = f"Batches come late{on_ranks(lost)}: more workers that load data, more batches fetched ahead, {ahead}."
    return advise(case, "input", case.gain("input"), what, compared(lost), idle_words(case.detail.gaps, ["input"]))


def synchronizing(case: Case) -> Advice:
    """The host waited for the device before it launched on."""
    lost = case.lost_by("synchronize")
    names = [gap.doing for gap in case.detail.gaps if gap.bucket == "host" and BLOCKING.search(gap.doing)]
    by = f", in {names[0]}" if names else ""
    what = (
        f"The host waits for the device{on_ranks(lost)}{by}, and launches late after it: keep values on the device; "
        "read a loss (.item(), .cpu(), print) once in many steps."
    )
    less_s = by_profiling(case, "synchronize")
    evidence = (less_words(less_s), compared(lost), idle_words(case.detail.gaps, ["host"]))
    return advise(case, "synchronize", case.gain("synchronize") - less_s, what, *evidence)


def launching(case: Case) -> Advice:
    """Work was launched later than the device was ready for it, by a host that was busy launching."""
    detail, lost = case.detail, case.lost_by("launch")
    less_s = by_profiling(case, "launch")
    gain = case.gain("launch") - less_s
    evidence = [less_words(less_s), compared(lost), launch_words(case), idle_words(detail.gaps, ["host"])]
    if case.jax:
        what = (
            "The device waits for programs to be called: one jax.jit around the whole step, several steps in one "
            "program (jax.lax.scan), arguments that lie on the devices already."
        )
        return advise(case, "launch", gain, what, evidence[0], evidence[1], evidence[3])
    if case.kind == "cpu":
        what = (
            "Python runs between operators, and nothing computes: larger microbatches, torch.compile, fewer operators."
        )
    elif 0 < detail.kernel_s < TINY_KERNEL_S:
        what = (
            "Kernels are shorter than launching them takes: larger microbatches, fewer of them; then torch.compile or "
            "CUDA graphs."
        )
        return advise(case, "microbatch", gain, what, *evidence)
    else:
        what = (
            "The device waits for work to be launched: torch.compile, larger microbatches, fewer small kernels, "
            "CUDA graphs."
        )
    return advise(case, "launch", gain, what, *evidence)


def by_profiling(case: Case, cause: str) -> float:
    """How much of a cause's gain the profiler made itself: on a device it slows launching, and nothing else.

    What profiled steps took longer is divided over all that launches late, in proportion. On a CPU it slows operators
    too, and this cannot be told.
    """
    lost = case.lost_by("straggler")
    slow_rank = max(lost, key=lambda rank: lost[rank])
    late = {name: case.gain(name) for name in ("launch", "synchronize")}
    late["straggler"] = min(case.gain("straggler"), longer_parts(case, slow_rank).get("launch", 0.0))
    whole = sum(late.values())
    return late[cause] * min(1.0, case.profiling_s / whole) if whole > 0 and case.kind != "cpu" else 0.0


def less_words(seconds: float) -> str:
    """What was taken off a gain."""
    return f"less {seconds_text(seconds)} that launching took longer for being profiled" if seconds > 0 else ""


def launch_words(case: Case) -> str:
    """Kernels in a step, and how long they are."""
    detail = case.detail
    if case.kind == "cpu" or not detail.launches:
        return ""
    pace = seconds_text(case.wall_s / detail.launches)
    return f"{detail.launches:,} launches, one in {pace}; a kernel takes {seconds_text(detail.kernel_s)}"


def host_late(case: Case) -> Advice:
    """The same where the record does not say what the host did."""
    what = (
        "The device waits for work to be launched; the record does not say what the host did meanwhile. One "
        "made anew does."
    )
    if case.kind == "cpu":
        what = "Python runs between operators, and nothing computes: larger microbatches, or fewer operators."
    return advise(case, "host", case.gain("host"), what, compared(case.lost_by("host")))


def collecting(case: Case) -> Advice:
    """Python's garbage collector ran, and nothing was launched."""
    lost = case.lost_by("collect")
    what = (
        f"Python collects garbage in the step{on_ranks(lost)}: gc.freeze() after the first step, then gc.disable() and "
        "gc.collect() on all ranks at the same step, once in many."
    )
    return advise(case, "collect", case.gain("collect"), what, compared(lost))


def allocating(case: Case) -> Advice:
    """The caching allocator had to ask the driver: memory is nearly full, or in pieces."""
    gaps = [gap for gap in case.detail.gaps if gap.bucket == "host" and ALLOCATION.search(gap.doing)]
    memory, full = case.memory, ""
    if memory is not None:
        full = f"{bytes_text(memory.total())} at the fullest moment, {bytes_text(memory.fragmentation)} of it in pieces"
    # Our own runs have the one (src/meshwright/__main__.py), and samples of one length.
    tidier = "" if case.job else "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, equal sequence lengths, or "
    what = (
        f"Steps allocate and free the device's memory, which is nearly full or in pieces: {tidier}a smaller microbatch."
    )
    longest = f"longest {seconds_text(gaps[0].seconds)} in {gaps[0].doing}" if gaps else ""
    return advise(case, "memory", case.gain("memory"), what, compared(case.lost_by("memory")), longest, full)


def saving(case: Case) -> Advice:
    """A step stood still while a checkpoint was written."""
    background = "orbax's AsyncCheckpointer" if case.jax else "torch.distributed.checkpoint.async_save"
    what = f"Steps stand still while a checkpoint is saved: save in the background ({background}), or less often."
    return advise(case, "checkpoint", case.gain("checkpoint"), what, compared(case.lost_by("checkpoint")))


def straggling(case: Case) -> Advice:
    """Ranks waited for one that was slower at equal work, by nothing that has a name of its own."""
    lost, less_s = case.lost_by("straggler"), by_profiling(case, "straggler")
    gain = case.gain("straggler") - less_s
    slowest = sorted(lost, key=lambda rank: -lost[rank])
    late = [rank for rank in slowest if lost[rank] > max(IN_TURN * lost[slowest[0]], 0.0)]
    if len(late) != 1:
        among = f"most for {ranks_text(sorted(late))}" if late else ""
        what = (
            "Ranks are late in turn, and the others wait: no single rank is at fault. Look for what runs on the hosts "
            "now and then: other processes, garbage collection, devices that slow down when hot."
        )
        return advise(case, "straggler", gain, what, less_words(less_s), among)
    what = (
        f"Rank {late[0]} is slower than its peers at equal work, and they wait for it: look at that device's clock and "
        "temperature, its host's load and its links; exchange it with another and see whether the delay moves."
    )
    return advise(case, "straggler", gain, what, less_words(less_s), longer_words(case, late[0]))


def longer_parts(case: Case, rank: int) -> dict[str, float]:
    """What takes longer on a slow rank than on those that wait for it, seconds of a mean step by part."""
    total: dict[str, float] = {}
    for losses in case.losses:
        for part, seconds in losses.longer.get(rank, {}).items():
            total[part] = total.get(part, 0.0) + seconds / len(case.losses)
    return total


def longer_words(case: Case, rank: int) -> str:
    """The same in words."""
    total = longer_parts(case, rank)
    parts = sorted((part for part in total if part), key=lambda part: -total[part])
    told = [
        f"{seconds_text(total[part])} by {PARTS[part]}" for part in parts if total[part] > 0.1 * sum(total.values())
    ]
    return f"longer there: {', '.join(told)}" if told else "no part of its own step is longer than on its peers"


def unexplained(case: Case) -> Advice | None:
    """The device stood still, and nothing says why: never dressed up as something else."""
    found = {
        cause: (case.gain(cause), words)
        for cause, words in (
            ("python", "while the host was in Python, in no operator"),
            ("other", "with nothing to book it to"),
        )
    }
    found = {cause: one for cause, one in found.items() if one[0] > UNEXPLAINED[cause] * case.wall_s}
    if not found:
        return None
    parts = [f"{of_step(seconds, case.wall_s)} {words}" for seconds, words in found.values()]
    lost = [case.lost_by(cause) for cause in found]
    each = {rank: sum(seconds[rank] for seconds in lost) for rank in lost[0]}
    what = (
        f"Time is lost{on_ranks(each)}, and nothing recorded says why: mark what the program does there with "
        f"{'jax.profiler.TraceAnnotation' if case.jax else 'torch.profiler.record_function'}, or sample its Python "
        "stack."
    )
    evidence = (" and ".join(parts), compared(each), idle_words(case.detail.gaps, ["host", "other"]))
    return advise(case, "unexplained", sum(seconds for seconds, _ in found.values()), what, *evidence)
