"""What tells one training program from another, as far as time and memory are concerned."""

from typing import Any, Literal

import msgspec

from meshwright.spec.errors import SettingError, closest
from meshwright.spec.numbers import LARGEST, check_range

# How attention's scores are treated: never whole in memory, by cuDNN's kernels or by FlashAttention 2 or 1; whole, with
# masking and softmax as one kernel; or whole, an operator at a time.
AttentionKernel = Literal["cudnn", "flash", "flash-1", "fused-softmax", "plain"]
# How cross entropy treats logits: compiled, in compute precision; by torch's operators, in fp32; or by Megatron's over
# a vocabulary that ranks divide, which turns one fp32 copy into the gradient in place.
LossKernel = Literal["compiled", "plain", "in-place"]
# What selective recomputing keeps: the results of matrix products, attention and transfers; of attention and of every
# second product; or all but attention's scores.
Selective = Literal["products", "half-products", "all-but-scores"]


class Trainer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A training program on GPUs.

    compiled: element-wise work of a block is fused, by torch.compile or by kernels as large; else each operator passes
        over memory by itself.
    fused_norms: each norm is one kernel even where nothing is compiled.
    attention: its kernel.
    dropout: blocks drop activations, of attention's scores too, and keep what they dropped.
    sequence_parallel: along tensor, norms and residuals lie split over the sequence; else all ranks do all of them.
    regathers: what lies split over the sequence and is gathered for a product is gathered once more in the backward
        pass; else it is kept whole.
    splits_experts: along tensor, ranks of an expert divide its matrices and are given all of its tokens; else each has
        whole experts and its own tokens' copies.
    gathers: parameters are gathered block by block out of fp32 shards, as FSDP and ZeRO-3 do; else they lie whole in
        compute precision beside their fp32 masters, which are split with the optimizer's states.
    overlaps: parameters and gradients travel beside compute; else once all of a step's backward passes are done.
    overlaps_reductions: so do gradients that are reduced block by block; else each block waits for its own.
    fp8: of what bf16 products reach of their peak, what fp8 ones reach of theirs, casts and scales included.
    async_tensor: transfers along tensor that layout.async_tensor hides, of those that there is compute beside.
    splits_states: masters and optimizer states are divided over shard and context; else each rank has all of its own.
    loss: the kernel of cross entropy.
    whole_logits: ranks of the tensor axis gather their parts of the logits, and each of them computes the whole loss.
    selective: what of a block selective recomputing keeps.
    keeps_sent: what a pipeline's stage has sent on stays until its gradient comes back.
    gradient_bytes: of a parameter's gradient where gradients are added up, and where they are reduced.
    fragmentation: what the caching allocator has reserved and cannot use, as a share of what comes and goes in a step
        (activations, logits, buffers), or more where a recomputed block's room is. By default the upper end of what
        nearly all runs of our own showed while each piece of memory was asked for by itself.
    one_port: a collective between nodes goes through one port of each node, where others use all.
    source: where all this is written down.
    """

    name: str
    compiled: bool = False
    fused_norms: bool = True
    attention: AttentionKernel = "cudnn"
    dropout: bool = False
    sequence_parallel: bool = True
    regathers: bool = True
    splits_experts: bool = False
    gathers: bool = False
    overlaps: bool = True
    overlaps_reductions: bool = True
    # Both from torchtitan's published steps of an 8B model (arXiv:2410.06511): in fp8 1.5 times as fast, not twice;
    # with async_tensor over 8 ranks 0.25 s shorter, of 0.58 s of transfers.
    fp8: float = 0.75
    async_tensor: float = 0.45
    splits_states: bool = True
    loss: LossKernel = "plain"
    whole_logits: bool = False
    selective: Selective = "all-but-scores"
    keeps_sent: bool = False
    gradient_bytes: int = 4
    fragmentation: float = 0.15
    one_port: bool = False
    source: str


MESHWRIGHT = Trainer(
    name="meshwright",
    compiled=True,
    gathers=True,
    loss="compiled",
    selective="products",
    # Ranges that grow (src/meshwright/__main__.py): 0 to 3% in seven runs of benchmarks/training_gpu.py on one H200
    # that did not recompute everything (torch 2.11, 2026-11-23).
    fragmentation=0.02,
    source="src/meshwright/parallel",
)
TRAINERS: dict[str, Trainer] = {
    trainer.name: trainer
    for trainer in (
        MESHWRIGHT,
        Trainer(
            name="torchtitan",
            compiled=True,
            attention="flash",
            gathers=True,
            selective="half-products",
            # Its five published peaks are within 3% so.
            fragmentation=0.1,
            source="arXiv:2410.06511; FSDP2 as in PyTorch's fully_shard; selective recomputing of each second product, "
            "and the loss in fp32 by itself, as in pytorch/torchtitan of December 2024",
        ),
        Trainer(
            name="fsdp",
            attention="flash",
            gathers=True,
            selective="products",
            source="PyTorch FSDP, arXiv:2304.11277, with eager blocks and FlashAttention",
        ),
        Trainer(
            name="deepspeed-zero3",
            attention="fused-softmax",
            dropout=True,
            gathers=True,
            # overlap_comm, which DeepSpeed's configuration left off by default then.
            overlaps_reductions=False,
            gradient_bytes=2,
            one_port=True,
            source="ZeRO-3 as measured in arXiv:2104.04473, table 2",
        ),
        Trainer(
            name="megatron-lm",
            attention="fused-softmax",
            dropout=True,
            sequence_parallel=False,
            overlaps=False,
            loss="in-place",
            gradient_bytes=2,
            source="arXiv:2104.04473, arXiv:2205.05198: fused softmax, gradients reduced after the last backward pass",
        ),
        Trainer(
            name="megatron-deepspeed",
            attention="fused-softmax",
            dropout=True,
            sequence_parallel=False,
            overlaps=False,
            loss="in-place",
            keeps_sent=True,
            gradient_bytes=2,
            source="bigscience-workshop/Megatron-DeepSpeed: fused softmax, ZeRO-1 after the last backward pass; "
            "DeepSpeed's pipeline keeps outputs",
        ),
        Trainer(
            name="aleph-alpha-scaling",
            fused_norms=False,
            sequence_parallel=False,
            regathers=False,
            overlaps=False,
            gradient_bytes=2,
            whole_logits=True,
            keeps_sent=True,
            source="Aleph-Alpha/scaling: gradients in bf16, ZeRO-1 after the last backward pass, logits gathered whole",
        ),
        Trainer(
            name="nemo",
            compiled=True,
            fp8=0.88,
            async_tensor=0.9,
            loss="in-place",
            gradient_bytes=2,
            source="NVIDIA's in mlcommons/training_results: delayed scaling in fp8, CUDA graphs, userbuffers",
        ),
        Trainer(
            name="megatron-core",
            compiled=True,
            dropout=True,
            loss="in-place",
            source="NVIDIA Megatron-Core with Transformer Engine: fused kernels, distributed optimizer overlapped",
        ),
    )
}


def check_trainer(trainer: Trainer) -> None:
    """Raise SettingError for shares that are none, and gradients of no size that a number has."""
    check_range("trainer.fp8", trainer.fp8, 0.01, 1.0)
    check_range("trainer.async_tensor", trainer.async_tensor, 0.0, 1.0)
    check_range("trainer.fragmentation", trainer.fragmentation, 0.0, 1.0)
    check_range("trainer.gradient_bytes", trainer.gradient_bytes, 1, LARGEST)


def expand_trainer(section: dict[str, Any]) -> dict[str, Any]:
    """A job's [trainer] table with what its name stands for. What else it says takes the place of that."""
    name = section.get("name", MESHWRIGHT.name)
    if name not in TRAINERS:
        raise SettingError(f'trainer.name = "{name}"', "no such trainer is known", closest(str(name), TRAINERS))
    return msgspec.to_builtins(TRAINERS[name]) | section
