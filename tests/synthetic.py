"""Run folders and measured steps made by hand, with every number known. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from meshwright.account import MeasuredStep, MemoryAccount, Purpose, StepAccount, Transfer
from meshwright.record import (
    Ended,
    Evaluation,
    LineWriter,
    Memory,
    Metrics,
    Prediction,
    RunFolder,
    Span,
    Step,
    create_run,
    start_attempt,
)
from meshwright.spec import Cluster, DataSettings, Device, Job, Layout, Link, ModelSpec, RunSettings
from meshwright.spec.decode import encode_job

Group = tuple[int, ...]


class Meeting(msgspec.Struct, frozen=True):
    """A collective in a simulated step: before it, each rank computes `work[rank]` seconds (default `usual`)."""

    purpose: Purpose
    ranks: Group
    usual: float
    transfer_s: float
    late: Mapping[int, float] = {}


def simulate(
    world: int, meetings: Sequence[Meeting], *, hosts: Sequence[str] = (), clocks: Mapping[str, float] | None = None
) -> list[MeasuredStep]:
    """One step of `world` ranks in which every collective blocks, as each rank's own clock would measure it."""
    host = [hosts[rank] if hosts else "a" for rank in range(world)]
    skew = [(clocks or {}).get(host[rank], 0.0) for rank in range(world)]
    now = [0.0] * world
    busy = [0.0] * world
    transfers: list[list[Transfer]] = [[] for _ in range(world)]
    count: dict[tuple[str, Group], int] = {}
    for meeting in meetings:
        index = count[meeting.purpose, meeting.ranks] = count.get((meeting.purpose, meeting.ranks), -1) + 1
        for rank in meeting.ranks:
            work = meeting.usual + meeting.late.get(rank, 0.0)
            busy[rank] += work
            now[rank] += work
        end = max(now[rank] for rank in meeting.ranks) + meeting.transfer_s
        for rank in meeting.ranks:
            span = (now[rank] + skew[rank], end + skew[rank])
            transfers[rank].append(
                Transfer(
                    purpose=meeting.purpose,
                    ranks=meeting.ranks,
                    index=index,
                    start_s=span[0],
                    end_s=span[1],
                    exposed=(span,),
                )
            )
            now[rank] = end
    return [
        MeasuredStep(
            step=1,
            rank=rank,
            host=host[rank],
            start_s=skew[rank],
            end_s=now[rank] + skew[rank],
            account=StepAccount(
                inefficiency=busy[rank],
                **{
                    f"comm_{purpose}": sum(t.exposed_s() for t in transfers[rank] if t.purpose == purpose)
                    for purpose in ("replica", "shard", "control")
                },
            ),
            transfers=tuple(transfers[rank]),
        )
        for rank in range(world)
    ]


def a_job(name: str = "run", *, replica: int = 1, shard: int = 4, peak: float = 1e12, steps: int = 100) -> Job:
    """A small job on a made-up device."""
    link = Link(name="wire", bytes_per_s=1e9, latency_s=1e-5, source="made up")
    device = Device(
        name="toy",
        kind="cpu",
        memory_bytes=4e9,
        memory_bytes_per_s=1e10,
        peak_bf16_flops_per_s=peak,
        peak_fp32_flops_per_s=peak,
        source="made up",
    )
    return Job(
        run=RunSettings(name=name, steps=steps),
        model=ModelSpec(layers=2, d_model=64, heads=4, kv_heads=2, head_dim=16, feed_forward=128, vocabulary=257),
        data=DataSettings(sequence=64, global_batch=8),
        layout=Layout(replica=replica, shard=shard, precision="fp32"),
        cluster=Cluster(device=device, devices_per_node=replica * shard, intra=link, inter=link),
    )


def a_prediction(job: Job) -> Prediction:
    """A plan of 0.25 s a step."""
    step = StepAccount(useful=0.10, inefficiency=0.09, optimizer=0.01, comm_shard=0.04, comm_control=0.01)
    return Prediction(
        layout=job.layout,
        step=step,
        overlapped={"shard": 0.02},
        memory=MemoryAccount(
            parameters=4e6, gradients=4e6, optimizer_states=8e6, activations=3e7, logits=2e6, framework=3e8
        ),
        step_s=step.total(),
        tokens_per_s=job.data.global_batch * job.data.sequence / step.total(),
    )


def a_step(step: int, *, world: int = 4, slow: int | None = None, by: float = 0.0) -> list[MeasuredStep]:
    """A profiled step of about 0.26 s; rank `slow` computes `by` seconds longer than its peers."""
    late = {slow: by} if slow is not None else {}
    group = tuple(range(world))
    meetings = [
        Meeting("shard", group, 0.10, 0.02),
        Meeting("shard", group, 0.08, 0.03, late),
        Meeting("control", group, 0.01, 0.005),
    ]
    return [
        msgspec.structs.replace(
            one,
            step=step,
            overlapped={"shard": 0.015},
            account=one.account + StepAccount(useful=0.09, inefficiency=-0.09 - 0.016, optimizer=0.01, host=0.006),
        )
        for one in simulate(world, meetings)
    ]


def a_memory(scale: float = 1.0) -> MemoryAccount:
    """Measured memory close to `a_prediction`'s."""
    return MemoryAccount(
        parameters=4e6,
        gradients=4e6,
        optimizer_states=8e6,
        activations=3.3e7 * scale,
        logits=2e6,
        communication_buffers=1e6,
        framework=3.1e8,
        fragmentation=4e6,
    )


def write_metrics(folder: RunFolder, steps: range, *, attempt: int = 0, step_s: float = 0.25, mfu: float | None = 0.4):
    """A loss that falls from 5.5 towards 2, and an evaluation at each end."""
    writer = LineWriter(folder.metrics)
    for step in (*steps, steps[-1] + 1):
        if step in (0, steps[-1] + 1):
            held_out = 2.0 + 3.5 * 0.97**step + 0.05
            writer.append(Evaluation(step=step, attempt=attempt, time_s=step * step_s, held_out_loss=held_out))
        if step in steps:
            writer.append(
                Metrics(
                    step=step,
                    attempt=attempt,
                    time_s=step * step_s,
                    loss=2.0 + 3.5 * 0.97**step,
                    gradient_norm=1.0,
                    learning_rate=1e-3,
                    step_s=step_s,
                    tokens_per_s=512 / step_s,
                    mfu=mfu,
                    memory_bytes=3.6e8,
                )
            )
    writer.close()


def write_rank(
    folder: RunFolder,
    attempt: int,
    rank: int,
    *,
    steps: range,
    measured: Sequence[MeasuredStep] = (),
    memory: MemoryAccount | None = None,
    step_s: float = 0.25,
    begin_s: float = 0.0,
    how: str | None = "finished",
) -> float:
    """One rank's life: 3 s startup, 1 s evaluation, the steps, 0.5 s measurement, 0.5 s checkpoint. Returns its end."""
    writer = LineWriter(folder.events(attempt, rank))
    now = begin_s

    def span(name: str, seconds: float, step: int = 0, count: int = 1) -> None:
        nonlocal now
        writer.append(Span(name=name, start_s=now, end_s=now + seconds, step=step, count=count))
        now += seconds

    span("startup", 3.0)
    span("evaluation", 1.0)
    span("step", step_s * len(steps), step=steps[-1], count=len(steps))
    for one in measured:
        writer.append(Step(measured=one))
    if memory is not None:
        writer.append(Memory(step=steps[0], account=memory))
    span("measurement", 0.5)
    span("checkpoint", 0.5)
    if how is not None:
        writer.append(Ended(step=steps[-1], time_s=now + 0.1, how=how))
        now += 0.1
    writer.close()
    return now


def a_run(
    path: Path,
    *,
    name: str = "run",
    slow: int | None = None,
    by: float = 0.0,
    profiled: Sequence[int] = (25, 75),
    ranks: Sequence[int] = (0, 1, 2, 3),
    peak: float = 1e12,
) -> RunFolder:
    """A finished run of 100 steps on 4 ranks."""
    job = a_job(name, peak=peak)
    folder = create_run(path, encode_job(job))
    attempt = start_attempt(folder, a_prediction(job))
    write_metrics(folder, range(100), mfu=0.4 if peak else None)
    measured = [a_step(step, slow=slow, by=by) for step in profiled]
    for rank in ranks:
        write_rank(
            folder,
            attempt,
            rank,
            steps=range(100),
            measured=[step[rank] for step in measured],
            memory=a_memory(1.0 + 0.1 * rank),
        )
    return folder
