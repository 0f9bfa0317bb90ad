"""How long the command takes to plan for large clusters, from the process's start, on one core, and in how much memory.

    python benchmarks/planning_speed.py [--repeats 3]

The best of some repeats counts: what a busy machine adds is not the program's. Processor time is shown beside it, which
other programs add little to. Exit code 1 where a bar is missed.
"""

import argparse
import os
import resource
import subprocess
import sys
import time

# Model, cluster, global batch in sequences of 8,192 tokens; seconds that it may take.
CASES = (
    ("llama3-70b", "128x8xh100", 1024, 1.0),
    ("llama3.1-405b", "2048x8xh100", 2048, 5.0),
)
MOST_BYTES = 500e6


def run_once(model: str, gpus: str, global_batch: int) -> tuple[float, float, float]:
    """Seconds from start to end, seconds of the processor, and bytes at the peak."""
    command = [sys.executable, "-m", "meshwright", "plan", "--model", model, "--gpus", gpus]
    command += ["--sequence", "8192", "--global-batch", str(global_batch)]
    # As an installed program is: with its modules compiled already.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=kept, preexec_fn=keep_one_core)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"planning {model} on {gpus} ended with exit code {process.returncode}")
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024.0


def keep_one_core() -> None:
    """Leave this process one of its cores, and no memory beyond reason."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> int:
    """Print a line for each case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    missed = 0
    for model, gpus, global_batch, bar_s in CASES:
        runs = [run_once(model, gpus, global_batch) for _ in range(arguments.repeats)]
        best_s, cpu_s, peak_bytes = (min(run[place] for run in runs) for place in range(3))
        fine = best_s <= bar_s and peak_bytes <= MOST_BYTES
        missed += not fine
        print(
            f"{model:14} on {gpus:12} {best_s:.2f} s ({cpu_s:.2f} s of the processor), {best_s / bar_s:.2f} of its bar "
            f"of {bar_s:g} s; {peak_bytes / 1e6:.0f} MB of {MOST_BYTES / 1e6:.0f}{'' if fine else '  MISSED'}"
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
