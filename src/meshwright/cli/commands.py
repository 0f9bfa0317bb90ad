"""The command line: the only reader of arguments and environment. Every verb imports what it needs when it runs."""

import gc
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshwright import __version__
from meshwright.cli.calibration import calibrate, calibrate_agent
from meshwright.cli.data import data
from meshwright.cli.machine import (
    as_setting,
    check_devices,
    described,
    here,
    local,
    read,
    read_runnable,
    under_torchrun,
)
from meshwright.cli.options import SET, console
from meshwright.cli.rehearsal import rehearse, rehearse_agent
from meshwright.spec.errors import SettingError, closest

if TYPE_CHECKING:
    from meshwright.spec import Job


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="meshwright")
def cli() -> None:
    """Decide how to spread a transformer's training over GPUs, train it that way, see where every second went."""


@cli.command()
@click.argument("job", required=False, type=click.Path(path_type=Path))
@click.option("--model", help="A named model, without a job file: llama3-8b.")
@click.option("--gpus", help="Its cluster: 8xh100, or 4x8xh100 for four nodes of eight.")
@click.option(
    "--cluster",
    "clusters",
    multiple=True,
    metavar="FILE|NAME",
    help="A file with a [cluster] section, or 8xh100: in the JOB's place. Several: which one to take.",
)
@click.option("--sequence", type=int, default=None, help="Tokens per sample.  [default: 8192]")
@click.option("--global-batch", type=int, default=None, help="Samples per step.  [default: about 1M tokens]")
@click.option(
    "--objective",
    default="fastest",
    show_default=True,
    metavar="GOAL",
    help="fastest, cheapest, fewest (devices for a deadline), longest (sequence) or largest (model).",
)
@click.option("--tokens", type=float, help="To train on in all: how long it takes, and at what cost.")
@click.option("--deadline-hours", type=float, help="Of --objective fewest: how long all --tokens may take.")
@click.option("--fix", "fixes", multiple=True, metavar="LAYOUT.X=Y", help="Leave a setting of the layout as it is.")
@click.option("--curve", is_flag=True, help="Also plan for fewer devices: speed and efficiency against their number.")
@click.option("--noise-tokens", type=float, help="The gradient noise scale, in tokens; with --curve.")
@click.option("--rehearsed", type=click.Path(path_type=Path), metavar="FILE", help="What `rehearse` measured of it.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write the plan as a page: plan.html.")
@SET
def plan(
    job: Path | None,
    model: str | None,
    gpus: str | None,
    clusters: tuple[str, ...],
    sequence: int | None,
    global_batch: int | None,
    objective: str,
    tokens: float | None,
    deadline_hours: float | None,
    fixes: tuple[str, ...],
    curve: bool,
    noise_tokens: float | None,
    rehearsed: Path | None,
    as_json: bool,
    html: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Predict layouts for a JOB file, or for --model on --gpus: fit, speed, and why not the others."""
    from meshwright.cli.goal import Pages, read_goal, show_plan

    # What a search makes has no cycles to speak of, and looking for them takes a tenth of its time.
    gc.disable()
    goal = read_goal(objective, tokens, deadline_hours, fixes, curve=curve, noise_tokens=noise_tokens)
    if job is not None:
        given = {"--model": model, "--gpus": gpus, "--sequence": sequence, "--global-batch": global_batch}
        for option, value in given.items():
            if value is not None:
                raise SettingError(option, "is for planning without a job file", f"--set, as in {as_setting(option)}")

    def wanted(cluster: str | None) -> "Job":
        if job is not None:
            return read(job, settings, cluster)
        return described(model, gpus, cluster, sequence, global_batch, settings)

    if len(clusters) > 1 and gpus is not None:
        raise SettingError("--gpus", "is one cluster more beside --cluster", f"--cluster {gpus}")
    pages = Pages(as_json=as_json, html=html, rehearsed=rehearsed)
    show_plan(wanted, clusters, goal, console, pages, whole=job is not None)


@cli.command()
@click.argument("job", required=False, type=click.Path(path_type=Path))
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with a run from its checkpoint.")
@SET
def train(job: Path | None, resume: Path | None, settings: tuple[str, ...]) -> None:
    """Train a JOB file's model on this machine, or as a rank under torchrun."""
    from meshwright import launch

    began_s = time.time()
    if (job is None) == (resume is None):
        raise SettingError("meshwright train", "takes either a job file or --resume RUN", "meshwright train JOB.toml")
    launch.needs_torch("train")
    if resume is not None:
        folder, resolved = launch.reopen_run(resume, settings, local=local, admit=check_devices)
    else:
        assert job is not None
        folder, resolved = None, read_runnable(job, settings)
    # The profiler prints a line for each step it watches, and only the environment can silence it.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if under_torchrun():
        join(resolved, folder.path if folder else None, began_s)
        return
    folder, attempt = launch.begin_attempt(folder, resolved)
    sys.exit(launch.run_attempt(folder, attempt, began_s))


@cli.command()
@click.argument("paths", nargs=-1, required=True, metavar="RUN|TRACE...", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the explanation as JSON.")
@click.option("--report", type=click.Path(path_type=Path), help="The page to write.  [default: RUN/report.html]")
@click.option("--flops-per-step", type=float, help="Of traces: model FLOPs of a rank's step; with --gpu.")
@click.option("--gpu", help="Of traces: h100, whose dense bf16 peak says what is useful; with --flops-per-step.")
@click.option("--purpose", multiple=True, metavar="NAME=PURPOSE", help="Of traces: what a group or collective is for.")
def explain(
    paths: tuple[Path, ...],
    as_json: bool,
    report: Path | None,
    flops_per_step: float | None,
    gpu: str | None,
    purpose: tuple[str, ...],
) -> None:
    """Where a RUN's seconds went and what to change, and what was predicted; or the same of TRACEs, one a rank.

    A trace is what PyTorch's or JAX's profiler writes: .json or .json.gz, or a folder of them.
    """
    from meshwright.explain import explain_paths
    from meshwright.record import RunFolder
    from meshwright.report.explain import explain_json, explain_text

    explanation = explain_paths(paths, flops_per_step=flops_per_step, gpu=gpu, purposes=named_purposes(purpose))
    if as_json:
        click.echo(explain_json(explanation))
    else:
        explain_text(explanation, console())
        if report is None and not explanation.traces:
            report = RunFolder(paths[0]).report
    if report is None:
        if not as_json:
            click.echo("report: none; --report FILE writes one")
        return
    from meshwright.report.html import write_report

    try:
        write_report(explanation, report)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise SettingError(str(report), reason, "meshwright explain --json, which writes no file") from None
    if not as_json:
        click.echo(f"report: {report}")


def named_purposes(given: tuple[str, ...]) -> dict[str, str]:
    """Names and purposes of --purpose NAME=PURPOSE."""
    pairs = {text: text.rpartition("=") for text in given}
    for text, (name, _, purpose) in pairs.items():
        if not name or not purpose:
            raise SettingError(f"--purpose {text}", "is no NAME=PURPOSE", "--purpose all-gather=shard")
    return {name: purpose for name, _, purpose in pairs.values()}


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", default="def ", show_default=True, help="Text to continue.")
@click.option("--tokens", type=click.IntRange(1), default=200, show_default=True, help="How many tokens to add.")
@click.option("--temperature", type=float, default=0.8, show_default=True, help="0 takes the likeliest.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
def sample(run: Path, prompt: str, tokens: int, temperature: float, seed: int) -> None:
    """Continue a text with the newest checkpoint of a RUN."""
    from meshwright import launch
    from meshwright.record import open_run

    # Logits are divided by it: what is much smaller makes infinities of them. nan is in no range either.
    if temperature != 0 and not 1e-6 <= temperature <= 1e6:
        nearest = "--temperature 1e-6" if 0 < temperature < 1 else "--temperature 0"
        raise SettingError(f"--temperature {temperature}", "must be 0, or lie between 1e-6 and 1e6", nearest)
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of the command line that are no text come as halves of characters
        raise SettingError("--prompt", "is not text in UTF-8", "--prompt with other characters") from None
    launch.needs_torch("sample")
    open_run(run)
    from meshwright.train.sample import sample_text

    click.echo(sample_text(run, prompt, tokens, temperature, seed))


@cli.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what was compared as JSON.")
@SET
def verify(job: Path, as_json: bool, settings: tuple[str, ...]) -> None:
    """Check that a JOB's layout trains as one process does: a small job of its kind, tensor by tensor.

    Exit code 1 where they differ, with the first module that does and the likely cause.
    """
    from meshwright import launch
    from meshwright.explain.verification import explain_trial
    from meshwright.report.verification import verification_json, verification_text

    launch.needs_torch("verify")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        trials = launch.run_trials(read(job, settings), local=here)
    except launch.VerificationEnded as ended:
        sys.exit(ended.code)
    judged = [(trial, explain_trial(trial)) for trial in trials]
    if as_json:
        click.echo(verification_json(judged))
    else:
        for trial, verdict in judged:
            verification_text(trial, verdict, console())
    sys.exit(0 if all(verdict.agrees for _, verdict in judged) else 1)


@cli.command(hidden=True)
@click.argument("run")
@click.argument("attempt", type=int)
@click.argument("parent", type=int)
def verify_agent(run: str, attempt: int, parent: int) -> None:
    """The child process of `verify`: runs the job in one process and in its layout."""
    from meshwright import launch

    launch.become_agent(parent)
    from meshwright.verify.agent import verify_run

    sys.exit(verify_run(run, attempt))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", "form", required=True, metavar="FORMAT", help="hf: a folder that transformers loads.")
@click.option("--out", type=click.Path(path_type=Path), help="The new folder.  [default: RUN/hf-step-N]")
@click.option("--dtype", help="fp32 or bf16.  [default: as in the model.path that it began from, or fp32]")
def convert(run: Path, form: str, out: Path | None, dtype: str | None) -> None:
    """Write the newest checkpoint of a RUN for other programs. Needs no GPU."""
    from meshwright import launch
    from meshwright.record import open_run

    for option, value, known in (("--to", form, ("hf",)), ("--dtype", dtype, ("fp32", "bf16"))):
        if value is not None and value not in known:
            raise SettingError(f"{option} {value}", "is none that is written here", f"{option} {closest(value, known)}")
    launch.needs_torch("convert")
    folder = open_run(run)
    job = read(folder.job, ())
    from meshwright.checkpoint import convert_run

    click.echo(f"written: {convert_run(folder, job, out, dtype)}")
    if job.model.path and not Path(job.model.path).is_dir():
        click.echo(f"warning: {job.model.path} is gone, and with it the tokenizer's files, if it had any", err=True)


@cli.command(hidden=True)
@click.argument("run")
@click.argument("attempt", type=int)
@click.argument("began_s", type=float)
@click.argument("parent", type=int)
def agent(run: str, attempt: int, began_s: float, parent: int) -> None:
    """The child process of `train`: starts this node's ranks and waits for them."""
    from meshwright import launch

    launch.become_agent(parent)
    from meshwright.train.agent import watch_ranks

    sys.exit(watch_ranks(run, attempt, began_s))


cli.add_command(calibrate)
cli.add_command(calibrate_agent)
cli.add_command(data)
cli.add_command(rehearse)
cli.add_command(rehearse_agent)


def join(job: "Job", resume: Path | None, began_s: float) -> None:
    """Be one rank of an external torchrun: rank 0 makes the run folder and its attempt, the others are told."""
    from meshwright import launch
    from meshwright.record import RunFolder
    from meshwright.train.worker import join_ranks

    world_size = int(os.environ["WORLD_SIZE"])
    if world_size != job.layout.world_size:
        raise SettingError(
            f"layout of {job.layout.world_size} ranks",
            f"torchrun started {world_size}",
            f"torchrun --nproc-per-node {job.layout.world_size}",
        )

    def begin() -> tuple[str, int]:
        folder, attempt = launch.begin_attempt(RunFolder(resume) if resume else None, job)
        return str(folder.path), attempt

    def forget(run: str, attempt: int) -> None:
        launch.forget_untrained(RunFolder(Path(run)), attempt)

    join_ranks(job, begin, forget, began_s)


def main() -> None:
    """Run the command line; what cannot be honoured is one line and exit code 2."""
    try:
        cli.main(standalone_mode=False)
        # Here, where a reader that went away is noticed, and not at exit.
        sys.stdout.flush()
    except SettingError as error:
        fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        sys.exit(2)
    except click.ClickException as error:
        fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(line: str) -> None:
    """Print one line and end with exit code 2."""
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
    sys.exit(2)
