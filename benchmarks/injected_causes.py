"""Causes of lost time, added to other people's programs from outside, against what `meshwright explain` says of each.

    python benchmarks/injected_causes.py [--programs bare huggingface ...] [--cases input two ...] [--repeats 2]

Runs the programs of benchmarks/programs, on two ranks, recorded: as they are, and with causes of injections.py added.
Judges of each case whether the right causes come first, and whether the gain that explain expects is what they cost, by
the programs' own step times with and without them. Of a clean run nothing may be said. Exits with 1 if one fails.

On GPUs the model has a billion parameters, and steps of runs are compared that take turns, a clean one first and last.

On CPUs the model is small, causes sleep, and two of them do not exist: a process that is its own device is never waited
for, and loses the time of short operators in the operators. There other work takes the cores as it pleases. So causes
act in every other step, all sampled ones among them, and these are compared with the steps between; contention, as
explain calls it, is the machine's and no false alarm, nor is what costs less than steps without a cause differ by.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any, NamedTuple

import torch

PROGRAMS = Path(__file__).parent / "programs"
# The gain that explain expects lies within this share of what a cause did cost.
NEAR = 0.1
# What explain names from this share of a step on. A cause that costs less is not to be named.
LEAST = 0.03
# Steps of a program that are over when its record begins: what wraps a program waits for its first update.
UNRECORDED = {"torchtitan": 1}
# Of a run's steps, those that come first are not counted.
WARM = 0.25
TIMEOUT_S = 400


class Case(NamedTuple):
    """Options that add causes, and what explain is to name first: all of them, or, with either, any of these names.

    shape: of the model's input, here and in the clean runs that it is compared with, where the usual one shows nothing.
    """

    name: str
    options: tuple[str, ...]
    causes: tuple[str, ...]
    either: bool = False
    shape: tuple[str, ...] = ()


class Setting(NamedTuple):
    """How the programs are run on a kind of device.

    delay_ms: what sleeping causes sleep in a step; alternate: in every other one; tolerated: what explain may say.
    """

    common: tuple[str, ...]
    programs: dict[str, tuple[str, ...]]
    delay_ms: int
    alternate: bool
    tolerated: frozenset[str]


class Outcome(NamedTuple):
    """One run. step_s: of steps that were not sampled, by the program's own clock. advice: most costly first."""

    step_s: dict[int, float]
    advice: tuple[tuple[str, float], ...]
    closes: bool

    def usual_s(self, parity: int | None = None) -> float:
        """The median step; of the even or odd ones alone where parity is 0 or 1."""
        return median(s for number, s in self.step_s.items() if parity is None or number % 2 == parity)

    def gain_s(self, causes: Sequence[str]) -> float:
        """What explain expects of mending these causes."""
        return sum(gain for cause, gain in self.advice if cause in causes)

    def said(self) -> str:
        """The causes that explain names, with their gains in milliseconds."""
        return ", ".join(f"{cause} {gain * 1e3:.0f}" for cause, gain in self.advice) or "nothing"


def setting_of(cuda: bool, ranks: int) -> Setting:
    """The host of a GPU runs up to 210 ms ahead of it, and what is shorter costs nothing."""
    sharded = cuda and ranks > 1
    bare = "none" if ranks == 1 else "fsdp2" if cuda else "ddp"
    programs: dict[str, tuple[str, ...]] = {
        "bare": ("bare_loop.py", "--parallel", bare),
        "accelerate": ("accelerate_loop.py", *([] if sharded else ["--ddp"])),
        "huggingface": ("huggingface_trainer.py", *(["--fsdp"] if sharded else [])),
        "torchtitan": ("torchtitan_llama.py",),
    }
    if cuda:
        steps = ("--steps", "16", "--every-steps", "5")
        return Setting(common=steps, programs=programs, delay_ms=400, alternate=False, tolerated=frozenset())
    return Setting(
        common=("--small", "--layers", "2", "--sequence", "512", "--steps", "20"),
        # Samples lie in the middle of each so many recorded steps: all of them in even steps of the program.
        programs={
            name: (*words, "--every-steps", "6" if name in UNRECORDED else "8") for name, words in programs.items()
        },
        delay_ms=1000,
        alternate=True,
        tolerated=frozenset({"contention"}),
    )


def cases_of(delay_ms: int, *, cuda: bool, ranks: int) -> list[Case]:
    """What is added, one case after the other; of what exists there."""
    late, slow = ("--delay-input", str(delay_ms)), ("--slow-rank", "1", "--slow-ms", str(delay_ms))
    asleep = ("--sleep", str(delay_ms))
    short = ("--sequence", "512", "--microbatch", "16")
    on_gpus = [
        Case("item", ("--item", "--items-per-step", "16"), ("synchronize",)),
        Case("tiny", ("--tiny-microbatches",), ("launch", "microbatch"), either=True, shape=short),
    ]
    second, found = (slow, "straggler") if ranks > 1 else (asleep, "unexplained")
    return [
        Case("input", late, ("input",)),
        *([Case("slow rank", slow, ("straggler",))] if ranks > 1 else []),
        *(on_gpus if cuda else []),
        Case("two", (*late, *second), ("input", found)),
        Case("outside", asleep, ("unexplained",)),
    ]


def run_program(program: Sequence[str], ranks: int, options: Sequence[str], folder: Path) -> None:
    """Run one program, recorded in a folder, with its step times beside it."""
    script, *more = program
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    kept = ["--record", str(folder), "--step-times", str(folder.with_suffix(".json"))]
    ended = subprocess.run(
        [*start, str(PROGRAMS / script), *more, *options, *kept],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if ended.returncode:
        sys.exit(
            f"{script} {' '.join(options)} ended with {ended.returncode}:\n{(ended.stdout + ended.stderr)[-3000:]}"
        )


def read_outcome(folder: Path, unrecorded: int) -> Outcome:
    """A run's step times, and what explain makes of it; unrecorded: steps before its record begins."""
    step_s = json.loads(folder.with_suffix(".json").read_text())["step_s"]
    explained = subprocess.run(
        [sys.executable, "-m", "meshwright", "explain", str(folder), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(explained.stdout)
    if found["step"] is None:
        sys.exit(f"{folder}: {found['notes']} {found['faults']}")
    # The program's clock tells no first step.
    numbered = dict(enumerate(step_s, start=1))
    left_out = {*range(round(WARM * len(step_s))), *(number + unrecorded for number in found["step"]["steps"])}
    return Outcome(
        step_s={number: seconds for number, seconds in numbered.items() if number not in left_out},
        advice=tuple((one["cause"], one["gain_s"] or 0.0) for one in found["advice"]),
        closes=found["step"]["closes"],
    )


def judge(case: Case, clean: Sequence[Outcome], injected: Sequence[Outcome], setting: Setting) -> bool:
    """Print a row of the table; whether explain said what is true."""
    noise_s = noise_of(clean)
    if setting.alternate:
        usual_s = fmean(one.usual_s(1) for one in injected)
        cost_s = fmean(one.usual_s(0) for one in injected) - usual_s
    else:
        usual_s = fmean(one.usual_s() for one in clean)
        cost_s = fmean(one.usual_s() for one in injected) - usual_s
    gain_s = fmean(one.gain_s(case.causes) for one in injected)
    worth = cost_s > LEAST * (usual_s + cost_s)
    good = all(one.closes for one in injected)
    for one in injected:
        named = [cause for cause, gain in one.advice if cause not in setting.tolerated and gain > noise_s]
        wanted = set(case.causes) & set(named) if case.either else set(case.causes)
        good &= bool(wanted) and set(named[: len(wanted)]) == wanted if worth else not named
    off = gain_s / cost_s - 1 if worth else 0.0
    good &= abs(off) <= NEAR
    print_row(case.name, cost_s, noise_s, gain_s, f"{off:+.1%}" if worth else "-", injected, good=good)
    return good


def judge_clean(clean: Sequence[Outcome], setting: Setting) -> bool:
    """The same where nothing was added."""
    noise_s = noise_of(clean)
    said = [gain for one in clean for cause, gain in one.advice if cause not in setting.tolerated]
    good = all(one.closes for one in clean) and max(said, default=0.0) <= (noise_s if setting.alternate else 0.0)
    print_row("clean", 0.0, noise_s, 0.0, "-", clean, good=good)
    return good


def noise_of(clean: Sequence[Outcome]) -> float:
    """Half of the steps without any cause lie within so much of the usual one: half of their interquartile range."""
    quarters = quantiles([seconds for one in clean for seconds in one.step_s.values()], n=4)
    return (quarters[2] - quarters[0]) / 2


def print_row(
    name: str, cost_s: float, noise_s: float, gain_s: float, off: str, runs: Sequence[Outcome], *, good: bool
) -> None:
    """One row of a program's table."""
    says = " / ".join(one.said() for one in runs)
    sizes = "".join(f"{seconds * 1e3:>7.0f}" for seconds in (cost_s, noise_s, gain_s))
    print(f"  {name:<10}{sizes}{off:>8}  {'yes' if good else 'NO':<5}  {says}", flush=True)


def judge_program(
    name: str, setting: Setting, ranks: int, cases: Sequence[Case], repeats: int, folder: Path
) -> list[bool]:
    """Run a program clean and with each case by turns, and judge them all."""
    program = setting.programs[name]
    clean: dict[tuple[str, ...], list[Outcome]] = {}
    injected: dict[str, list[Outcome]] = {case.name: [] for case in cases}

    def run(label: str, shape: tuple[str, ...], options: tuple[str, ...] = ()) -> Outcome:
        place = folder / f"{name}-{label.replace(' ', '-')}"
        if options and setting.alternate:
            options = (*options, "--even-steps")
        if not place.with_suffix(".json").is_file():
            run_program(program, ranks, [*setting.common, *shape, *options], place)
        one = read_outcome(place, UNRECORDED.get(name, 0))
        print(f"{place.name}: {one.usual_s() * 1e3:.0f} ms, {one.said()}", file=sys.stderr, flush=True)
        return one

    shapes = list(dict.fromkeys(case.shape for case in cases))
    for turn in range(repeats + 1):
        for shape in shapes if turn < repeats or not setting.alternate else ():
            clean.setdefault(shape, []).append(run(f"{turn}-clean{'-short' if shape else ''}", shape))
        for case in cases if turn < repeats else ():
            injected[case.name].append(run(f"{turn}-{case.name}", case.shape, case.options))
    usual = clean.get((), clean[shapes[0]])
    print(f"\n{name}: a clean step takes {fmean(one.usual_s() for one in usual) * 1e3:.0f} ms; ms a step")
    print(f"  {'case':<10}{'cost':>7}{'noise':>7}{'gain':>7}{'off':>8}  right  what was said, run by run")
    verdicts = [judge_clean(usual, setting)]
    verdicts += [judge(case, clean[case.shape], injected[case.name], setting) for case in cases]
    return verdicts


def main() -> None:
    """Run and judge what the options choose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ranks", type=int, choices=[1, 2], default=2, help="of one, no rank can be slower than another"
    )
    parser.add_argument("--programs", nargs="+", choices=list(setting_of(False, 2).programs))
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in cases_of(0, cuda=True, ranks=2)])
    parser.add_argument("--delay", type=int, metavar="MS", help="what sleeping causes sleep in a step")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for the runs; those that it holds are not run again")
    options = parser.parse_args()
    cuda, ranks = torch.cuda.is_available(), options.ranks
    if cuda and torch.cuda.device_count() < ranks:
        sys.exit(f"--ranks {ranks} needs as many GPUs: --ranks 1")
    setting = setting_of(cuda, ranks)
    programs = options.programs or list(setting.programs)
    if "torchtitan" in programs and find_spec("triton") is None:
        print("torchtitan imports triton, which is not installed: left out")
        programs.remove("torchtitan")
    known = cases_of(options.delay or setting.delay_ms, cuda=cuda, ranks=ranks)
    cases = [case for case in known if not options.cases or case.name in options.cases]
    if missing := set(options.cases or ()) - {case.name for case in cases}:
        sys.exit(f"{', '.join(sorted(missing))}: does not exist here; {', '.join(case.name for case in known)} do")
    with tempfile.TemporaryDirectory() as folder:
        place = options.keep or Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        judged = [judge_program(name, setting, ranks, cases, options.repeats, place) for name in programs]
    verdicts = [verdict for program in judged for verdict in program]
    print(f"\n{sum(verdicts)} of {len(verdicts)} right: named first, and within {NEAR:.0%} of their cost")
    sys.exit(0 if all(verdicts) else 1)


if __name__ == "__main__":
    main()
