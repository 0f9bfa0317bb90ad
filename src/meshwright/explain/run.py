"""Read a run folder back and put what was predicted beside what was measured."""

from collections.abc import Mapping, Sequence

from meshwright.account import MemoryAccount
from meshwright.explain.advice import give_advice
from meshwright.explain.case import Case, build_case, has_details
from meshwright.explain.explanation import Explanation, MeasuredSteps, MemoryComparison, RankFault, RunLife
from meshwright.explain.findings import find_in_losses, find_in_memory, find_in_step
from meshwright.explain.life import mean_mfu, run_account, yield_of
from meshwright.explain.program import is_jax, notes_on_program, program_device, program_mfu, program_of, program_world
from meshwright.explain.steps import (
    RankStep,
    poor_account,
    resolve_steps,
    slowed_by_profiling,
    summarise,
    unprofiled_step_s,
)
from meshwright.explain.words import ranks_text
from meshwright.record import (
    Ended,
    Event,
    Fault,
    Memory,
    Prediction,
    Program,
    RunFolder,
    Step,
    read_events,
    read_metrics,
    read_prediction,
)
from meshwright.spec import Cluster, Job, SettingError
from meshwright.spec.decode import read_job

# Fewer steps than these are not worth a profile.
LEAST_STEPS = 4


def explain_run(folder: RunFolder) -> Explanation:
    """Everything the folder tells about its run, which may still be going on or may have lost files."""
    notes: list[str] = []
    program = program_of(folder, notes)
    job = job_of(folder, notes) if folder.job.is_file() else None
    numbers = folder.attempt_numbers()
    attempts = [read_events(folder, number) for number in numbers]
    newest = numbers[-1] if numbers else None
    events = attempts[-1] if attempts else {}
    prediction = read_prediction(folder, newest) if newest is not None and program is None else None
    metrics, evaluations = read_metrics(folder)
    world_size = world_size_of(job, program, prediction, events)
    missing = tuple(rank for rank in range(world_size) if rank not in events)

    steps = resolve_steps(events, job)
    step = summarise([one.resolved for ranks in steps for one in ranks]) if steps else None
    memory = compare_memory(events, prediction)
    step_s = unprofiled_step_s(metrics, profiled_steps(events), newest)
    mfu = mean_mfu(metrics) or program_mfu(program, step_s)
    account = run_account(attempts, step.account if step is not None else None, mfu)
    own = [line for line in metrics if line.attempt == newest]
    why = unprofiled(len(own), job) if program is None else "record(every_steps=N) profiles one in N steps"
    notes += notes_on(events, missing, prediction, step, newest, why, planned=folder.job.is_file())
    if program is not None and newest is not None:
        notes += notes_on_program(program, step)
    if step is not None and step_s and (slowed := slowed_by_profiling(step.wall_s, step_s)):
        notes.append(slowed)
    case = case_of(steps, job, program, memory, step_s) if steps else None
    # A loss that another program did not tell its recorder looks the same as one that is not finite.
    findings = find_in_losses(tuple(metrics)) if program is None else []
    findings += find_in_step(step, prediction) if step is not None else []
    return Explanation(
        path=str(folder.path),
        name=job.run.name if job is not None else program.name if program is not None else folder.path.name,
        job=job,
        job_toml=text_of(folder),
        attempts=len(numbers),
        attempt=newest,
        world_size=world_size,
        ranks=tuple(events),
        missing_ranks=missing,
        ending=ending_of(events, missing, numbers, cut_short=newest is not None and folder.cut_short(newest).is_file()),
        metrics=tuple(metrics),
        evaluations=tuple(evaluations),
        prediction=prediction,
        step=step,
        difference=prediction.step - step.account if prediction is not None and step is not None else None,
        step_s=step_s,
        memory=memory,
        life=RunLife(account=account, yield_=yield_of(account)),
        faults=faults_of(numbers, attempts),
        findings=tuple(findings + find_in_memory(memory)),
        notes=tuple(notes),
        program=program,
        detail=case.detail if case is not None and has_details(steps) else None,
        advice=give_advice(case) if case is not None else (),
    )


def case_of(
    steps: list[list[RankStep]],
    job: Job | None,
    program: Program | None,
    memory: MemoryComparison,
    step_s: float | None,
) -> Case:
    """The profiled steps with what is known of their device, for advice."""
    kind = job.cluster.device.kind if job is not None else program.kind if program is not None else ""
    return build_case(
        steps,
        kind=kind,
        device=job.cluster.device if job is not None else program_device(program),
        precision=job.layout.precision if job is not None else program.precision if program is not None else None,
        memory=memory.measured,
        job=job,
        jax=is_jax(program),
        step_s=step_s,
    )


def job_of(folder: RunFolder, notes: list[str]) -> Job | None:
    """The resolved job, or None and a note: a run with a damaged job.toml can still be explained."""
    try:
        return read_job(folder.job, local=refuse_local)
    except SettingError as error:
        notes.append(f"The job cannot be read back: {error}")
        return None


def refuse_local(processes: int) -> Cluster:
    """A run's job names its cluster in numbers, so that nothing about this machine is ever asked."""
    raise SettingError("cluster", f"is not resolved ({processes} processes)", "a job.toml that meshwright train wrote")


def text_of(folder: RunFolder) -> str:
    """job.toml as it stands."""
    try:
        return folder.job.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def world_size_of(
    job: Job | None, program: Program | None, prediction: Prediction | None, events: Mapping[int, Sequence[Event]]
) -> int:
    """Ranks of the newest attempt; its plan knows best, since a restart may have changed the layout."""
    if prediction is not None:
        return prediction.layout.world_size
    if job is not None:
        return job.layout.world_size
    return program_world(program, events) if program is not None else max(events, default=-1) + 1


def profiled_steps(events: Mapping[int, Sequence[Event]]) -> set[int]:
    """Steps that any rank profiled."""
    return {line.measured.step for lines in events.values() for line in lines if isinstance(line, Step)}


def compare_memory(events: Mapping[int, Sequence[Event]], prediction: Prediction | None) -> MemoryComparison:
    """Each rank's fullest moment, and the fullest of the ranks beside the plan."""
    ranks: dict[int, MemoryAccount] = {}
    for rank, lines in events.items():
        accounts = [line.account for line in lines if isinstance(line, Memory)]
        if accounts:
            ranks[rank] = max(accounts, key=lambda account: account.total())
    fullest = max(ranks, key=lambda rank: ranks[rank].total(), default=None)
    return MemoryComparison(
        predicted=prediction.memory if prediction is not None else None,
        measured=ranks[fullest] if fullest is not None else None,
        rank=fullest,
        ranks=ranks,
    )


def faults_of(numbers: Sequence[int], attempts: Sequence[Mapping[int, Sequence[Event]]]) -> tuple[RankFault, ...]:
    """Faults of all attempts, in order."""
    return tuple(
        RankFault(attempt=number, rank=rank, step=line.step, what=line.what)
        for number, events in zip(numbers, attempts, strict=True)
        for rank, lines in events.items()
        for line in lines
        if isinstance(line, Fault)
    )


def ending_of(
    events: Mapping[int, Sequence[Event]], missing: Sequence[int], numbers: Sequence[int], *, cut_short: bool
) -> str:
    """How the newest attempt ended, in words. cut_short: as its launcher saw it."""
    if not numbers:
        return "has not started"
    ended = {rank: line for rank, lines in events.items() for line in lines if isinstance(line, Ended)}
    if not ended and cut_short:
        return "cut short: killed, stopped at once or crashed, with nothing saved at its end"
    if not ended:
        return "still running, or killed: no rank has written its end"
    words = " and ".join(sorted({line.how for line in ended.values()}))
    if words != "finished":
        words += f" at step {max(line.step for line in ended.values())}"
    open_ranks = [*(rank for rank in events if rank not in ended), *missing]
    return f"{words}; no end from {ranks_text(sorted(open_ranks))}" if open_ranks else words


def unprofiled(steps: int, job: Job | None) -> str:
    """Why none of so many steps was profiled, and what would profile one."""
    every = job.trace.every_steps if job is not None else 0
    # One in the middle of each `every_steps` is, and none of the first few.
    if not every or steps > every or steps <= LEAST_STEPS:
        return "trace.every_steps sets how often one is"
    return f"{steps} steps were run, and one in {every} is profiled: --set trace.every_steps={max(1, steps // 2)}"


def notes_on(
    events: Mapping[int, Sequence[Event]],
    missing: Sequence[int],
    prediction: Prediction | None,
    step: MeasuredSteps | None,
    attempt: int | None,
    unprofiled: str,
    *,
    planned: bool = True,
) -> list[str]:
    """What could not be measured or compared, and why.

    unprofiled: why that may be, where no step was profiled; planned: whether the run should have a plan.
    """
    notes: list[str] = []
    if attempt is None:
        return ["No attempt has started yet, so there is nothing to explain."]
    if missing:
        notes.append(f"No events from {ranks_text(missing)}: not in the accounts, and waits for them show as transfer.")
    if prediction is None and planned:
        notes.append("plan.json is missing or cannot be read, so nothing is compared with a prediction.")
    if step is None:
        some = profiled_steps(events)
        notes.append(
            "No step has been profiled on every rank yet, so there is no measured step account."
            if some
            else f"No step was profiled, so there is no measured step account ({unprofiled})."
        )
    else:
        silent = sorted(events.keys() - step.ranks.keys())
        if silent:
            notes.append(f"No profiled step from {ranks_text(silent)}; waits for them show as transfer.")
        if poor := poor_account(step):
            notes.append(poor)
    return notes
