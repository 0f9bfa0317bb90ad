"""A bare PyTorch loop over a decoder of a billion parameters, split in one of torch's own ways.

torchrun --nproc-per-node 2 benchmarks/programs/bare_loop.py --parallel fsdp2 [--small] [--profile FOLDER] ...
"""

import argparse
import os
import sys
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader, DistributedSampler

from common import Profiler, Sequences, StepClock, delayed, finish, inputs_and_targets, options_parser, settle
from decoder import Decoder, Layer, next_token_loss
from injections import inject
from recording import recorder_of

WAYS = ["none", "ddp", "fsdp1", "fsdp2", "tensor", "pipeline"]
DATA_PARALLEL = {"ddp", "fsdp1", "fsdp2"}
MAX_NORM = 1.0


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = options_parser("A bare PyTorch loop.")
    parser.add_argument("--parallel", choices=WAYS, default="none")
    options = settle(parser.parse_args())
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if (options.parallel == "none") != (ranks == 1):
        sys.exit(f"--parallel {options.parallel} and {ranks} processes: none is for one, the others are for several")
    if options.parallel == "pipeline" and options.accumulate < ranks:
        sys.exit(f"--parallel pipeline needs as many microbatches as stages: --accumulate {ranks} or more")
    return options


def start() -> tuple[int, int, torch.device]:
    """Join the other ranks: rank, ranks, device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return 0, 1, device
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size(), device


def split(model: Decoder, options: argparse.Namespace, ranks: int, device: torch.device) -> nn.Module:
    """The model as the loop calls it."""
    bf16 = torch.bfloat16 if options.precision == "bf16" else torch.float32
    match options.parallel:
        case "ddp":
            return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
        case "fsdp1":
            return FullyShardedDataParallel(
                model,
                auto_wrap_policy=ModuleWrapPolicy({Layer}),
                mixed_precision=MixedPrecision(param_dtype=bf16, reduce_dtype=torch.float32),
                device_id=device,
                use_orig_params=True,
            )
        case "fsdp2":
            policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32)
            for layer in model.layers:
                fully_shard(layer, mp_policy=policy)
            fully_shard(model, mp_policy=policy)
            return model
        case "tensor":
            return split_tensors(model, ranks, device)
        case _:
            return model


def split_tensors(model: Decoder, ranks: int, device: torch.device) -> nn.Module:
    """Tensor and sequence parallelism by torch's parallel styles; logits stay split over the vocabulary."""
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("tensor",))
    whole = PrepareModuleInput(input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None))
    for layer in model.layers:
        styles = {
            "attention_norm": SequenceParallel(),
            "attention": whole,
            "attention.query": ColwiseParallel(),
            "attention.key": ColwiseParallel(),
            "attention.value": ColwiseParallel(),
            "attention.out": RowwiseParallel(output_layouts=Shard(1)),
            "feed_forward_norm": SequenceParallel(),
            "feed_forward": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
            "feed_forward.gate": ColwiseParallel(),
            "feed_forward.up": ColwiseParallel(),
            "feed_forward.down": RowwiseParallel(output_layouts=Shard(1)),
        }
        parallelize_module(layer, mesh, styles)
    ends = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    return parallelize_module(model, mesh, ends)


def clip(model: nn.Module, across_stages: bool) -> None:
    """Clip the gradients by their norm over all ranks."""
    if isinstance(model, FullyShardedDataParallel):
        clip_sharded: Any = model.clip_grad_norm_
        clip_sharded(MAX_NORM)
        return
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None], foreach=True)
    if across_stages:
        norm = norm.square()
        dist.all_reduce(norm)
        norm = norm.sqrt()
    clip_grads_with_norm_(model.parameters(), MAX_NORM, norm, foreach=True)


def plain_pass(model: nn.Module, tokens: Tensor, targets: Tensor, options: argparse.Namespace) -> Tensor:
    """Forward and backward passes of one step; its mean loss."""
    losses: list[Tensor] = []
    microbatches = list(zip(tokens.split(options.microbatch), targets.split(options.microbatch), strict=True))
    for number, (inputs, expected) in enumerate(microbatches):
        last = number == len(microbatches) - 1
        with (
            model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext(),
            loss_parallel() if options.parallel == "tensor" else nullcontext(),
        ):
            loss = next_token_loss(model(inputs), expected)
            (loss / len(microbatches)).backward()
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def pipeline_pass(schedule: Schedule1F1B, rank: int, ranks: int, tokens: Tensor, targets: Tensor) -> Tensor | None:
    """The same along a pipeline; the last stage knows the loss."""
    losses: list[Tensor] = []
    whole = {"target": targets, "losses": losses} if rank == ranks - 1 else {}
    schedule.step(*([tokens] if rank == 0 else []), **whole)
    return torch.stack(losses).detach().mean() if losses else None


def build_loader(options: argparse.Namespace, rank: int, ranks: int, clock: StepClock) -> DataLoader[Any]:
    """One batch a step. The ranks of a tensor or pipeline axis read the same ones."""
    shares = ranks if options.parallel in DATA_PARALLEL else 1
    batch = options.microbatch * options.accumulate
    data = Sequences(options.steps * batch * shares, options.sequence + 1)
    sampler = DistributedSampler(data, shares, rank % shares, shuffle=True)
    collate = delayed(inputs_and_targets, options, clock)
    pinned = torch.cuda.is_available()
    return DataLoader(data, batch, sampler=sampler, collate_fn=collate, num_workers=options.workers, pin_memory=pinned)


def main() -> None:
    """Train."""
    options = read_options()
    rank, ranks, device = start()
    torch.manual_seed(0)
    pipeline = options.parallel == "pipeline"
    autocast = torch.bfloat16 if options.precision == "bf16" and "fsdp" not in options.parallel else None
    stage, stages = (rank, ranks) if pipeline else (0, 1)
    with device:
        decoder = Decoder(options.shape, options.sequence, stage, stages, autocast)
    layers = list(decoder.layers)
    model = split(decoder, options, ranks, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    clock, profiler = StepClock(device), Profiler(options, rank)
    inject(options, model, layers, rank, clock)
    schedule = None
    if pipeline:
        schedule = Schedule1F1B(PipelineStage(model, rank, ranks, device), options.accumulate, loss_fn=next_token_loss)

    losses: list[Tensor] = []
    recorder = recorder_of(options, model, optimizer)
    profiler.start()
    for batch in recorder.steps(build_loader(options, rank, ranks, clock)):
        tokens, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
        if schedule:
            loss = pipeline_pass(schedule, rank, ranks, tokens, targets)
        else:
            loss = plain_pass(model, tokens, targets, options)
        clip(model, across_stages=pipeline)
        optimizer.step()
        optimizer.zero_grad()
        losses += [torch.zeros((), device=device) if loss is None else loss]
        profiler.step()
    profiler.stop()
    recorder.close()

    if pipeline:
        # Only the last stage knows the loss.
        dist.all_reduce(losses[0])
        dist.all_reduce(losses[-1])
    shares = ranks if options.parallel in DATA_PARALLEL else 1
    tokens_per_step = options.microbatch * options.accumulate * options.sequence * shares
    finish(
        options,
        rank,
        clock,
        tokens_per_step,
        parallel=options.parallel,
        first_loss=losses[0].item(),
        last_loss=losses[-1].item(),
        profiler_call_s=round(profiler.longest_call_s, 2),
        export_s=round(profiler.export_s, 2),
    )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
