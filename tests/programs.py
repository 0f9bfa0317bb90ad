"""Runs and traces of other people's programs made by hand, with every number known. No torch."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
from synthetic import Meeting, a_memory, a_step, simulate, write_rank

from meshwright.account import MeasuredStep, StepAccount
from meshwright.explain.reading import RankTrace
from meshwright.record import (
    Gap,
    GroupTransfers,
    KernelGroup,
    LineWriter,
    Metrics,
    Program,
    RunFolder,
    Step,
    StepDetail,
    start_attempt,
    write_program,
)

PROGRAM = Program(
    name="my-run",
    trainer="Hugging Face Trainer 5.17",
    versions={"torch": "2.11.0", "transformers": "5.17"},
    device="NVIDIA H200",
    kind="cuda",
    world_size=4,
    memory_bytes=141e9,
    peak_flops_per_s=989.4e12,
    precision="bf16",
    parameters=1_235_814_400,
    flops_per_step=0.4 * 989.4e12 * 0.25,
    flops_from="counted in step 2",
    tokens_per_step=32_768,
)
DETAIL = StepDetail(
    kernels=(
        KernelGroup(purpose="matrix products", seconds=0.12, count=700, busiest="nvjet_tst_192x192_64x4_1x2_h_bz_NNT"),
        KernelGroup(
            purpose="normalisation and element-wise",
            seconds=0.06,
            count=1900,
            busiest="void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int)",
        ),
    ),
    groups=(
        GroupTransfers(
            group="mesh_fsdp",
            ranks=(0, 1, 2, 3),
            purpose="shard",
            count=66,
            sent_bytes=2.4e9,
            exposed_s=0.05,
            overlapped_s=0.03,
        ),
    ),
    gaps=(
        Gap(start_s=0.1, seconds=0.004, bucket="host", doing="aten::item", before="void gemm<float>(int)"),
        Gap(start_s=0.2, seconds=0.002, bucket="host", doing="", before=""),
    ),
    host={"launch": 0.001, "synchronize": 0.005},
    launches=2600,
    kernel_s=90e-6,
)


def write_losses(folder: RunFolder, losses: Sequence[float | None]) -> None:
    """One line a step, as a recorder outside of the trainer writes it: it knows the time, and a loss now and then."""
    writer = LineWriter(folder.metrics)
    for step, loss in enumerate(losses):
        writer.append(
            Metrics(
                step=step,
                attempt=0,
                time_s=0.25 * step,
                loss=loss,
                gradient_norm=None,
                learning_rate=None,
                step_s=0.25,
                tokens_per_s=None,
                mfu=None,
                memory_bytes=None,
            )
        )
    writer.close()


def a_program_run(
    path: Path,
    *,
    program: Program = PROGRAM,
    losses: Sequence[float | None] = (5.5, None, None, 4.5),
    slow: float = 0.0,
) -> RunFolder:
    """A finished run of 100 steps on 4 ranks that another trainer recorded."""
    folder = RunFolder(path)
    write_program(folder, program)
    attempt = start_attempt(folder, None)
    write_losses(folder, [*losses, *([None] * (100 - len(losses)))])
    measured = [a_step(step, slow=2 if slow else None, by=slow) for step in (25, 75)]
    for rank in range(4):
        writer = LineWriter(folder.events(attempt, rank))
        for step in measured:
            writer.append(Step(measured=step[rank], detail=DETAIL))
        writer.close()
        write_rank(folder, attempt, rank, steps=range(100), memory=a_memory(1.0 + 0.1 * rank))
    return folder


def a_pipeline_step(busy: Sequence[float], hops: int = 4) -> list[MeasuredStep]:
    """Two ranks that wait for each other's messages in turn, `busy` seconds of work each, nothing recorded of why."""
    meetings = [Meeting("pipeline", (0, 1), 0.0, 0.001, {hop % 2: 2 * busy[hop % 2] / hops}) for hop in range(hops)]
    return [
        msgspec.structs.replace(
            one, account=one.account + StepAccount(comm_pipeline=sum(t.exposed_s() for t in one.transfers))
        )
        for one in simulate(2, meetings)
    ]


def a_trace(
    path: Path, *, rank: int = -1, world_size: int = 0, steps: Sequence[Step] | None = None, kind: str = "cuda"
) -> RankTrace:
    """What a reader of traces says of one file: two steps of some rank of four."""
    own = max(rank, 0)
    lines = [Step(measured=a_step(step)[own], detail=DETAIL) for step in (7, 8)] if steps is None else steps
    return RankTrace(
        path=path,
        rank=rank,
        world_size=world_size,
        device="NVIDIA H200",
        kind=kind,
        producer="PyTorch profiler",
        steps=tuple(lines),
    )


def kineto_trace(rank: int) -> dict[str, object]:
    """What PyTorch's profiler writes of two steps on a GPU: 10 ms each, of which a kernel takes all."""
    events: list[dict[str, object]] = []

    def add(category: str, name: str, start_ms: float, end_ms: float, **args: int) -> None:
        span = {"ts": start_ms * 1e3, "dur": (end_ms - start_ms) * 1e3}
        row = 7 if category == "kernel" else 1
        events.append({"ph": "X", "cat": category, "name": name, "pid": 0, "tid": row, **span, "args": args})

    for step in range(2):
        begin = 10.0 * step
        add("user_annotation", "meshwright.step", begin, begin + 10)
        add("cuda_runtime", "cudaLaunchKernel", begin + 0.1, begin + 0.2, correlation=step)
        add("kernel", "sgemm", begin + 0.2, begin + 10.2, correlation=step)
    world = {"rank": rank, "world_size": 2}
    # As torch has it since 2.2: when the clock of `ts` began.
    return {
        "schemaVersion": 1,
        "distributedInfo": world,
        "baseTimeNanoseconds": 1_790_000_000_000_000_000,
        "traceEvents": events,
    }
