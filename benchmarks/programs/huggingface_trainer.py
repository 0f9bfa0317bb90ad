"""Hugging Face's Trainer on a Llama of a billion parameters, replicated or, with --fsdp, sharded by its own option.

torchrun --nproc-per-node 2 benchmarks/programs/huggingface_trainer.py [--fsdp] [--small] [--profile FOLDER] ...
"""

import argparse
import sys
import tempfile
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from common import Profiler, Sequences, StepClock, delayed, finish, huggingface_batch, options_parser, settle
from injections import inject
from llama import build_llama
from recording import callbacks_of


class Profiled(TrainerCallback):
    """Tells the profiler where the Trainer's steps end."""

    def __init__(self, profiler: Profiler) -> None:
        self._profiler = profiler

    def on_train_begin(self, *_arguments: Any, **_more: Any) -> None:
        self._profiler.start()

    def on_step_end(self, *_arguments: Any, **_more: Any) -> None:
        self._profiler.step()

    def on_train_end(self, *_arguments: Any, **_more: Any) -> None:
        self._profiler.stop()


class Injected(TrainerCallback):
    """Adds the causes once the Trainer has wrapped the model."""

    trainer: Trainer

    def __init__(self, options: argparse.Namespace, layers: list[nn.Module], clock: StepClock) -> None:
        self._options, self._layers, self._clock = options, layers, clock

    def on_train_begin(self, *_arguments: Any, **_more: Any) -> None:
        wrapped = self.trainer.model_wrapped
        assert wrapped is not None
        inject(self._options, wrapped, self._layers, self.trainer.args.process_index, self._clock)


def training_arguments(options: argparse.Namespace, folder: str) -> TrainingArguments:
    """The Trainer's defaults, but for what a benchmark cannot have: saves, reports to services."""
    sharded: dict[str, Any] = {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    }
    return TrainingArguments(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=options.microbatch,
        gradient_accumulation_steps=options.accumulate,
        bf16=options.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=options.workers,
        learning_rate=3e-4,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **(sharded if options.fsdp else {}),
    )


def main() -> None:
    """Train."""
    parser = options_parser("Hugging Face Trainer.")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 by the Trainer's own option, in place of DDP")
    options = settle(parser.parse_args())
    if options.fsdp and not torch.cuda.is_available():
        sys.exit("--fsdp needs GPUs: on CPUs accelerate replicates the model, and says nothing")
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(options, folder)
        rank, ranks = arguments.process_index, arguments.world_size
        torch.manual_seed(0)
        with arguments.device:
            model = build_llama(options)
        clock, profiler = StepClock(arguments.device), Profiler(options, rank)
        injected = Injected(options, list(model.model.layers), clock)
        sequences = options.microbatch * options.accumulate * ranks
        trainer = Trainer(
            model=model,
            args=arguments,
            data_collator=delayed(huggingface_batch, options, clock),
            train_dataset=Sequences(options.steps * sequences, options.sequence),
            callbacks=[Profiled(profiler), injected, *callbacks_of(options)],
        )
        injected.trainer = trainer
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        finish(
            options,
            rank,
            clock,
            sequences * options.sequence,
            parallel="fsdp" if options.fsdp else "ddp",
            last_loss=losses[-1] if losses else None,
            profiler_call_s=round(profiler.longest_call_s, 2),
            export_s=round(profiler.export_s, 2),
        )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
