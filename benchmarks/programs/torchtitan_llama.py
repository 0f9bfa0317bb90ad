"""torchtitan's own `torchtitan.train` on its Llama, at the size of a billion parameters.

    torchrun --nproc-per-node 2 benchmarks/programs/torchtitan_llama.py [--compile] [--recompute selective] ...

The same as `PROGRAM_OPTIONS="..." torchrun ... -m torchtitan.train ...`, which --print-command prints in full;
titan_extension.py is what torchtitan loads from here by its own option. torchtitan imports triton, which PyTorch's CPU
build does not bring: `pip install triton` first to run this on a CPU.
"""

import argparse
import importlib
import os
import runpy
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from common import PROFILED_STEPS, PROFILER_WARMUP_STEPS, options_parser, settle
from recording import wrapped

MODEL, FLAVOR = "llama_of_programs", "chosen"
VARIABLE = "PROGRAM_OPTIONS"


def read_options(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = options_parser("torchtitan on a Llama of a billion parameters.")
    parser.add_argument("--ddp", action="store_true", help="replicate the model in place of FSDP2")
    parser.add_argument("--compile", action="store_true", help="torchtitan's torch.compile of each layer")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--print-command", type=int, metavar="RANKS", help="print the torchrun command and end")
    return settle(parser.parse_args(words))


def titan_arguments(options: argparse.Namespace, data_parallel: int, folder: str) -> list[str]:
    """The options in torchtitan's words. What is not named keeps torchtitan's default."""
    settings: dict[str, Any] = {
        "experimental.custom_import": "titan_extension",
        "job.dump_folder": folder,
        "model.name": MODEL,
        "model.flavor": FLAVOR,
        "training.steps": options.steps,
        "training.seq_len": options.sequence,
        "training.local_batch_size": options.microbatch,
        "training.global_batch_size": options.microbatch * options.accumulate * data_parallel,
        "training.mixed_precision_param": "bfloat16" if options.precision == "bf16" else "float32",
        "lr_scheduler.warmup_steps": 2,
        "activation_checkpoint.mode": options.recompute,
        "parallelism.data_parallel_replicate_degree": data_parallel if options.ddp else 1,
        "parallelism.data_parallel_shard_degree": 1 if options.ddp else data_parallel,
        "metrics.disable_color_printing": True,
        "compile.enable": options.compile,
        # torchtitan's profiler asks for a GPU's activities even where there is none; the extension profiles there.
        "profiling.enable_profiling": options.profile is not None and torch.cuda.is_available(),
    }
    if options.recompute == "selective":
        settings["activation_checkpoint.selective_ac_option"] = "op"
    if options.profile:
        settings |= {
            "profiling.save_traces_folder": "traces",
            "profiling.profile_freq": options.steps,
            "profiling.profiler_warmup": PROFILER_WARMUP_STEPS,
            "profiling.profiler_active": PROFILED_STEPS,
        }
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words += [f"--{name}"] if value else []
        else:
            words += [f"--{name}", str(value)]
    return words


def stand_in_for_a_gpu() -> None:
    """Let torchtitan, which knows accelerators only, train on a CPU: it asks torch which device there is."""
    device = SimpleNamespace(
        set_device=lambda _device: None,
        current_device=lambda: 0,
        synchronize=lambda: None,
        get_device_name=lambda _device: "cpu",
        get_device_properties=lambda _device: SimpleNamespace(total_memory=1),
        reset_peak_memory_stats=lambda: None,
        empty_cache=lambda: None,
        memory_stats=lambda _device: {},
    )
    utils: Any = importlib.import_module("torch._utils")
    utils._get_available_device_type = lambda: "cpu"
    utils._get_device_module = lambda _type: device


def keep_trace(options: argparse.Namespace, folder: str) -> None:
    """Name the trace that torchtitan wrote for this rank as the other programs do."""
    rank = int(os.environ.get("RANK", 0))
    options.profile.mkdir(parents=True, exist_ok=True)
    for trace in Path(folder, "traces").glob(f"iteration_*/rank{rank}_trace.json"):
        shutil.move(trace, options.profile / f"rank-{rank}.json")


def plain_command(options: argparse.Namespace) -> str:
    """What one would type to run torchtitan's module without this script, on this machine, if it has GPUs."""
    ranks = options.print_command
    module, *arguments = [*wrapped(options, "torchtitan.train"), *titan_arguments(options, ranks, "outputs")]
    given = shlex.join(sys.argv[1:])
    return (
        f"PYTHONPATH={Path(__file__).parent} {VARIABLE}={shlex.quote(given)} "
        f"torchrun --standalone --nproc-per-node {ranks} -m {shlex.join([module, *arguments])}"
    )


def main() -> None:
    """Run torchtitan's module as `python -m` would."""
    options = read_options(sys.argv[1:])
    if options.print_command:
        print(plain_command(options))
        return
    with tempfile.TemporaryDirectory() as folder:
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        module, *arguments = [*wrapped(options, "torchtitan.train"), *titan_arguments(options, ranks, folder)]
        os.environ[VARIABLE] = shlex.join(sys.argv[1:])
        if not torch.cuda.is_available():
            stand_in_for_a_gpu()
        sys.argv = [sys.argv[0], *arguments]
        runpy.run_module(module, run_name="__main__")
        if options.profile:
            keep_trace(options, folder)


if __name__ == "__main__":
    main()
