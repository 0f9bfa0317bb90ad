"""What torchtitan loads by its own `experimental.custom_import`: the model's sizes, the data and the causes.

torchtitan parses its own command line, so the options of this folder's programs come in the variable
PROGRAM_OPTIONS, as they would stand on the command line of torchtitan_llama.py.
"""

# torchtitan is no requirement of the project.
# pyright: reportMissingImports=false

import atexit
import dataclasses
import os
import shlex
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import IterableDataset
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.models.llama3 import TransformerModelArgs, get_train_spec
from torchtitan.protocols.train_spec import register_train_spec

from common import Profiler, Sequences, Shape, StepClock, delayed, finish, inputs_and_targets
from decoder import ROTARY_BASE
from injections import inject
from torchtitan_llama import FLAVOR, MODEL, VARIABLE, read_options


def model_args(shape: Shape) -> TransformerModelArgs:
    """The shape in torchtitan's words, which derive the feed-forward size from the model's by factors."""
    return TransformerModelArgs(
        dim=shape.dim,
        n_layers=shape.layers,
        n_heads=shape.heads,
        n_kv_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        ffn_dim_multiplier=1.5 * shape.feed_forward / (4 * shape.dim),
        multiple_of=32,
        rope_theta=ROTARY_BASE,
    )


class EndlessSequences(IterableDataset[Tensor]):
    """A rank's share of the sequences; torchtitan's loader takes what can be iterated."""

    def __init__(self, rank: int, ranks: int, tokens: int) -> None:
        self.rank, self.ranks, self.tokens = rank, ranks, tokens

    def __iter__(self) -> Any:
        sequences = Sequences(2**31, self.tokens)
        index = self.rank
        while True:
            yield sequences[index]
            index += self.ranks


def titan_batch(samples: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """A batch as torchtitan's loop unpacks it."""
    inputs, targets = inputs_and_targets(samples)
    return {"input": inputs}, targets


def fit_cpu(model: nn.Module) -> None:
    """Reduce gradients by plain sums: torchtitan's divide factor of 1 asks for a reduction that gloo has not."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def extend() -> None:
    """Register the model under its own name, with torchtitan's own parts but for data and causes."""
    options = read_options(shlex.split(os.environ[VARIABLE]))
    shape = options.shape
    rank, ranks = torch.distributed.get_rank, torch.distributed.get_world_size
    clock = StepClock(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    spec = get_train_spec()

    def build_loader(dp_world_size: int, dp_rank: int, **_more: Any) -> ParallelAwareDataloader:
        data = EndlessSequences(dp_rank, dp_world_size, options.sequence + 1)
        return ParallelAwareDataloader(
            data,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            batch_size=options.microbatch,
            collate_fn=delayed(titan_batch, options, clock),
            num_workers=options.workers,
        )

    def parallelize(model: nn.Module, *arguments: Any) -> nn.Module:
        model = spec.parallelize_fn(model, *arguments)
        layers = list(model.get_submodule("layers").children())
        inject(options, model, layers, rank(), clock)
        if not torch.cuda.is_available():
            fit_cpu(model)
            profiler = Profiler(options, rank())
            profiler.start()
            clock.listeners.append(profiler.step)
        tokens = options.microbatch * options.accumulate * options.sequence * ranks()
        parallel = "ddp" if options.ddp else "fsdp2"
        atexit.register(
            finish, options, rank(), clock, tokens, parallel=parallel, compiled=options.compile, ac=options.recompute
        )
        return model

    register_train_spec(
        MODEL,
        dataclasses.replace(
            spec,
            model_args={FLAVOR: model_args(shape)},
            parallelize_fn=parallelize,
            build_dataloader_fn=build_loader,
            build_tokenizer_fn=None,
            pipelining_fn=None,
        ),
    )


extend()
