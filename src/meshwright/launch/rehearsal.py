"""`meshwright rehearse` up to the seam: one rank of the job by itself, and the process that runs it."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import msgspec

from meshwright.launch.attempt import FAR_ABOVE, GIB_OVER_GB, nearest_that_fits
from meshwright.launch.process import INTERRUPTED
from meshwright.launch.verification import wait_for
from meshwright.plan import build_paces, fullest_rank, library_bytes, local_cluster, rank_memory, rank_step
from meshwright.record import (
    Fault,
    Memory,
    Rehearsal,
    RehearsalTask,
    Rehearsed,
    RunFolder,
    Step,
    create_run,
    read_events,
    replace_text,
    start_attempt,
)
from meshwright.record.folder import json_text
from meshwright.spec import (
    CheckpointSettings,
    Cluster,
    Device,
    Job,
    RunSettings,
    SettingError,
    TraceSettings,
    check_trained,
)
from meshwright.spec.decode import encode_job

# One is profiled, for which the trainer warms up for three, and one comes behind it.
FEWEST_STEPS = 5
# The first compiles and fills caches; in the second memory is watched.
WARM_STEPS = 2


class RehearsalEnded(Exception):
    """The process that rehearses ended without a result; `code` is its exit code, and it said why itself."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(code)


def run_rehearsal(job: Job, rank: int | None, steps: int, *, local: Callable[[int], Cluster]) -> Rehearsal:
    """Run `steps` steps of one rank of the job's layout on this machine, where the others are not.

    rank: None for the one that is predicted to need most memory. Raises SettingError where that cannot be, and
    RehearsalEnded where the process ends without a result.
    """
    check_trained(job)
    check_rehearsed(job, steps)
    # A job for processes is rehearsed in one, whatever GPUs there are.
    here = local_cluster(1, "").device if job.cluster.device.kind == "cpu" else local(1).device
    job = on_device(job, here)
    rank = fullest_rank(job) if rank is None else check_rank(job, rank)
    refuse_memory(job, rank, here)
    print(f"rehearsing rank {rank} of {job.layout.world_size:,}, {steps} steps", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="meshwright-rehearse-") as name:
        small = msgspec.structs.replace(
            job,
            run=RunSettings(name="rank", folder=name, steps=steps, seed=job.run.seed),
            checkpoint=CheckpointSettings(at_end=False),
            trace=TraceSettings(every_steps=2 * profiled_step(steps)),
        )
        folder = create_run(Path(name) / "rank", encode_job(small))
        attempt = start_attempt(folder, None)
        replace_text(folder.task, json_text(RehearsalTask(rank=rank, steps=steps, paces=build_paces(job, rank))))
        arguments = ["rehearse-agent", str(folder.path), str(attempt), str(os.getpid())]
        try:
            code = wait_for(subprocess.Popen([sys.executable, "-m", "meshwright", *arguments], start_new_session=True))
        except KeyboardInterrupt:
            print("\nstopped; nothing was measured", file=sys.stderr)
            raise RehearsalEnded(INTERRUPTED) from None
        if code:
            raise RehearsalEnded(code)
        return read_rehearsal_run(job, folder, attempt, rank, steps)


def check_rehearsed(job: Job, steps: int) -> None:
    """Raise SettingError for what one rank cannot do by itself."""
    if steps < FEWEST_STEPS:
        reason = f"a step is measured once {FEWEST_STEPS - 2} have warmed up"
        raise SettingError(f"--steps {steps}", reason, f"--steps {FEWEST_STEPS}")
    if job.layout.async_tensor:
        reason = "its ranks write into each other's memory, and nobody else is there in a rehearsal"
        raise SettingError("layout.async_tensor = true", reason, "--set layout.async_tensor=false")


def check_rank(job: Job, rank: int) -> int:
    """The rank. Raises SettingError where the layout has none of that number."""
    ranks = job.layout.world_size
    if not 0 <= rank < ranks:
        reason = f"the layout has {ranks:,} rank{'' if ranks == 1 else 's, from 0'}"
        raise SettingError(f"--rank {rank}", reason, f"--rank {min(max(0, rank), ranks - 1)}")
    return rank


def on_device(job: Job, here: Device) -> Job:
    """The job with its devices as the one that is here, of the same kind. Raises SettingError where none is."""
    planned = job.cluster.device
    if planned.kind != here.kind:
        raise SettingError(
            f"cluster of {job.cluster.label()}",
            "one of its ranks needs one GPU, and this machine has none",
            f"a job with cluster.processes = {job.layout.world_size}, which rehearses on a CPU",
        )
    if planned.kind == "cpu" or planned.name == here.name:
        return job
    print(
        f"warning: this machine's GPU is another ({here.name}) than the cluster's ({planned.name}): times are for it "
        "and not for the plan, which takes the memory alone",
        file=sys.stderr,
    )
    return msgspec.structs.replace(job, cluster=msgspec.structs.replace(job.cluster, device=here))


def refuse_memory(job: Job, rank: int, here: Device) -> None:
    """Raise SettingError for a rank that cannot fit what is here: on a CPU it would not fail, but never get anywhere.

    A GPU says itself what is too much, unless it is so by far.
    """
    memory, on_cpu = rank_memory(job, rank), job.cluster.device.kind == "cpu"
    states = memory.parameters + memory.gradients + memory.optimizer_states
    there = here.memory_bytes
    if memory.total() <= (there if on_cpu else FAR_ABOVE * there) and (on_cpu or states <= GIB_OVER_GB * there):
        return
    what = "this machine has" if on_cpu else "this GPU has"
    reason = f"needs {memory.total() / 1e9:.1f} GB of the {there / 1e9:.1f} GB {what}"
    # Each rank by itself on such a device: ranks of one machine would be taken to share its memory.
    device = msgspec.structs.replace(job.cluster.device, memory_bytes=there)
    apart = msgspec.structs.replace(job.cluster, device=device, nodes=job.cluster.devices, devices_per_node=1)
    nearest = nearest_that_fits(msgspec.structs.replace(job, cluster=apart))
    raise SettingError(f"rank {rank} of {job.layout.label()}", reason, nearest)


def profiled_step(steps: int) -> int:
    """Which of the steps is profiled."""
    return steps - 2


def read_rehearsal_run(job: Job, folder: RunFolder, attempt: int, rank: int, steps: int) -> Rehearsal:
    """What a run folder tells, beside what was predicted. Raises RehearsalEnded where it does not tell enough."""
    rehearsed = msgspec.json.decode(folder.rehearsed.read_bytes(), type=Rehearsed)
    events = read_events(folder, attempt).get(rank, [])
    measured = [event.measured for event in events if isinstance(event, Step)]
    memories = [event.account for event in events if isinstance(event, Memory)]
    if not measured or not memories:
        faults = [event.what for event in events if isinstance(event, Fault)] or ["the profiled step left no account"]
        print(f"rank {rank} ran, but {faults[-1]}", file=sys.stderr)
        raise RehearsalEnded(1)
    memory = memories[-1]
    # A GPU's profiler opens a step ahead.
    disturbed = (profiled_step(steps) - 1, profiled_step(steps))
    calm_s = [s for step, s in enumerate(rehearsed.steps_s) if step >= WARM_STEPS and step not in disturbed]
    return Rehearsal(
        model=job.model,
        layout=job.layout,
        sequence=job.data.sequence,
        global_batch=job.data.global_batch,
        device=job.cluster.device.name,
        rank=rank,
        steps=steps,
        step_s=median(calm_s),
        predicted=rank_step(job, rank),
        predicted_memory=rank_memory(job, rank),
        measured=measured[-1].account,
        overlapped=measured[-1].overlapped,
        # The library that carries nothing here takes its part where it does.
        memory=msgspec.structs.replace(memory, framework=memory.framework + library_bytes(job)),
        asked=rehearsed.asked,
    )


def check_rehearsal_file(path: Path) -> None:
    """Raise SettingError where a file cannot be written, before minutes are spent on what would be in it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        reason = "is a folder" if path.is_dir() else ""
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
    if not reason and not os.access(path.parent, os.W_OK):
        reason = "cannot be written (no permission)"
    if reason:
        raise SettingError(f"--out {path}", reason, "--out rehearsal.json")


def write_rehearsal(rehearsal: Rehearsal, path: Path) -> None:
    """Leave a rehearsal for the plan. Raises SettingError where the file cannot be written."""
    try:
        replace_text(path, json_text(rehearsal))
    except OSError as error:
        raise SettingError(f"--out {path}", f"cannot be written ({error.strerror})", "--out rehearsal.json") from None
