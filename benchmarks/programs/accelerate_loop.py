"""A plain accelerate loop on a Llama of a billion parameters, sharded by accelerate's FSDP2 plugin or, with --ddp
(which CPUs need), replicated.

    torchrun --nproc-per-node 2 benchmarks/programs/accelerate_loop.py [--ddp] [--small] [--profile FOLDER] ...
"""

# accelerate is no requirement of the project.
# pyright: reportMissingImports=false

import argparse
import sys
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, ProfileKwargs
from torch import Tensor
from torch.utils.data import DataLoader

from common import Profiler, Sequences, StepClock, delayed, finish, huggingface_batch, options_parser, settle
from injections import inject
from llama import build_llama
from recording import recorder_of

MAX_NORM = 1.0


def build_accelerator(options: argparse.Namespace) -> Accelerator:
    """Accelerate with its own options alone."""
    sharded = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    return Accelerator(
        mixed_precision="bf16" if options.precision == "bf16" else "no",
        gradient_accumulation_steps=options.accumulate,
        fsdp_plugin=None if options.ddp else sharded,
        cpu=not torch.cuda.is_available(),
    )


def main() -> None:
    """Train."""
    parser = options_parser("A plain accelerate loop.")
    parser.add_argument("--ddp", action="store_true", help="replicate the model in place of FSDP2")
    options = settle(parser.parse_args())
    if not options.ddp and not torch.cuda.is_available():
        sys.exit("FSDP2 needs GPUs: on CPUs accelerate replicates the model, and says nothing; ask for that with --ddp")
    # Any: accelerate's own annotations take profile(), a context manager, for a function that never returns.
    accelerator: Any = build_accelerator(options)
    rank, ranks, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    torch.manual_seed(0)
    with device:
        model = build_llama(options)
    layers = list(model.model.layers)
    clock = StepClock(device)
    sequences = options.microbatch * options.accumulate * ranks
    loader = DataLoader(
        Sequences(options.steps * sequences, options.sequence),
        options.microbatch,
        shuffle=True,
        collate_fn=delayed(huggingface_batch, options, clock),
        num_workers=options.workers,
        pin_memory=device.type == "cuda",
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    profiler = Profiler(options, rank)
    inject(options, model, layers, rank, clock)

    losses: list[Tensor] = []
    recorder = recorder_of(options, model, optimizer)
    profile = ProfileKwargs(schedule_option=profiler.schedule, on_trace_ready=profiler.export)
    with accelerator.profile(profile) if options.profile else nullcontext() as profiler.inner:
        for batch in recorder.steps(loader):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                profiler.step()
    recorder.close()

    finish(
        options,
        rank,
        clock,
        sequences * options.sequence,
        parallel="ddp" if options.ddp else "fsdp2",
        first_loss=losses[0].item(),
        last_loss=losses[-1].item(),
        profiler_call_s=round(profiler.longest_call_s, 2),
        export_s=round(profiler.export_s, 2),
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
