"""One rank rehearsed by itself against the same rank among the others: memory and compute, one pair of runs a layout.

    python benchmarks/rehearsal_check.py [JOB] [--ranks 2] [--steps 12] [--rank 0] [--only TEXT] [--set A.B=C ...]

The rehearsal sees one device, the real run all of them. Both are the commands themselves, in processes of their own.
Exit code 1 where memory differs by more than MEMORY, or compute by more than COMPUTE. Processes of a CPU share its
memory bandwidth and caches, which a rehearsal has for itself: there compute is shown and not judged.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from meshwright.account import MemoryAccount
from meshwright.plan import local_cluster
from meshwright.record import Memory, Rehearsal, Step, open_run, read_events

MEMORY, COMPUTE = 0.02, 0.03


def layouts(ranks: int) -> dict[str, list[str]]:
    """Each axis alone, by the layout's name."""
    alone = ["layout.shard=1", "layout.replica=1"]
    return {
        f"shard {ranks}": [f"layout.shard={ranks}"],
        f"shard {ranks}, zero 1": [f"layout.shard={ranks}", "layout.zero=1"],
        f"replica {ranks}": ["layout.shard=1", f"layout.replica={ranks}"],
        f"tensor {ranks}": [*alone, f"layout.tensor={ranks}"],
        f"context {ranks}": [*alone, f"layout.context={ranks}"],
        f"pipeline {ranks}": [*alone, f"layout.pipeline={ranks}", "layout.microbatch=1"],
    }


def command(verb: str, job: Path, settings: list[str], *more: str) -> None:
    """Run `meshwright VERB` to its end."""
    given = [word for setting in settings for word in ("--set", setting)]
    subprocess.run([sys.executable, "-m", "meshwright", verb, str(job), *given, *more], check=True)


def rehearse(job: Path, settings: list[str], rank: int, steps: int, folder: Path) -> Rehearsal:
    """The rank by itself."""
    out = folder / "rehearsal.json"
    command("rehearse", job, settings, "--rank", str(rank), "--steps", str(steps), "--out", str(out))
    return msgspec.json.decode(out.read_bytes(), type=Rehearsal)


def train(job: Path, settings: list[str], rank: int, steps: int, folder: Path) -> tuple[MemoryAccount, float]:
    """The rank among the others: its memory, and the seconds of its compute, recompute and optimizer."""
    run = [f"run.folder={folder}", "run.name=real", f"run.steps={steps}", "checkpoint.at_end=false"]
    command("train", job, [*settings, *run, f"trace.every_steps={2 * (steps - 2)}"])
    events = read_events(open_run(folder / "real"), 0)[rank]
    (memory,) = [event.account for event in events if isinstance(event, Memory)]
    account = next(event.measured.account for event in events if isinstance(event, Step))
    return memory, account.compute + account.recompute + account.optimizer


def compare(name: str, rehearsal: Rehearsal, memory: MemoryAccount, compute_s: float) -> tuple[str, bool]:
    """A line of the table, and whether both are as near as they should be."""
    account = rehearsal.measured
    rehearsed_s = account.compute + account.recompute + account.optimizer
    off_memory, off_compute = rehearsal.memory.total() / memory.total() - 1, rehearsed_s / compute_s - 1
    judged = rehearsal.device != "cpu process"
    near = abs(off_memory) <= MEMORY and (abs(off_compute) <= COMPUTE or not judged)
    cells = [
        f"{rehearsal.memory.total() / 1e9:.3f}",
        f"{memory.total() / 1e9:.3f}",
        f"{off_memory:+.1%}",
        f"{rehearsed_s * 1e3:.1f}",
        f"{compute_s * 1e3:.1f}",
        f"{off_compute:+.1%}",
    ]
    return columns(name, cells), near


def columns(name: str, cells: list[str]) -> str:
    """A line of the table; the heading is one too."""
    return f"{name:<24}" + "".join(f"{cell:>12}" for cell in cells)


def main() -> None:
    """Rehearse and train every layout and print the table."""
    parser = argparse.ArgumentParser(description="Rehearsed ranks against real ones.")
    parser.add_argument("job", nargs="?", type=Path, default=Path("examples/llama-1b.toml"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", default="", help="run the layouts whose name contains this")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="change one key of the job")
    options = parser.parse_args()
    here = local_cluster(options.ranks)
    if here.devices < options.ranks:
        sys.exit(f"error: --ranks {options.ranks}: this machine has {here.label()}")
    lines: list[str] = []
    all_near = True
    for name, layout in layouts(options.ranks).items():
        if options.only in name:
            settings = [*layout, *options.set]
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                rehearsal = rehearse(options.job, settings, options.rank, options.steps, folder)
                real = train(options.job, settings, options.rank, options.steps, folder)
            line, near = compare(name, rehearsal, *real)
            all_near &= near
            lines.append(line)
            print(line, flush=True)
    print(
        f"\nrank {options.rank} of {options.ranks} on {here.device.name}: rehearsed, real and by how much they differ"
    )
    print(columns("layout", ["GB", "GB", "", "compute ms", "compute ms", ""]))
    print("\n".join(lines))
    sys.exit(not all_near)


if __name__ == "__main__":
    main()
