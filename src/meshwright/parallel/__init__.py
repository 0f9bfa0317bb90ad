"""The only creator of meshes and process groups, and the one order in which a layout is applied."""

from meshwright.parallel.apply import build_loss, build_parallel_model, build_token_loss, parallelize
from meshwright.parallel.balance import move_biases, take_loads
from meshwright.parallel.context import LocalBatch, cut_sequence
from meshwright.parallel.mesh import build_mesh, data_rank, join_group, start_distributed, stop_distributed, tell_all
from meshwright.parallel.part import copy_whole, local_part
from meshwright.parallel.pipeline import Passes, Stages
from meshwright.parallel.reduce import (
    StepTotals,
    clip_gradients,
    reduce_step,
    squared_norm,
    sum_over_ranks,
)
from meshwright.parallel.shard import begin_microbatch, free_gathered
from meshwright.parallel.silent import Ledger, start_silent
from meshwright.parallel.tensor import Loss, build_vocabulary_loss
from meshwright.parallel.update import HostAdamW, PartOptimizer

__all__ = [
    "HostAdamW",
    "Ledger",
    "LocalBatch",
    "Loss",
    "PartOptimizer",
    "Passes",
    "Stages",
    "StepTotals",
    "begin_microbatch",
    "build_loss",
    "build_mesh",
    "build_parallel_model",
    "build_token_loss",
    "build_vocabulary_loss",
    "clip_gradients",
    "copy_whole",
    "cut_sequence",
    "data_rank",
    "free_gathered",
    "join_group",
    "local_part",
    "move_biases",
    "parallelize",
    "reduce_step",
    "squared_norm",
    "start_distributed",
    "start_silent",
    "stop_distributed",
    "sum_over_ranks",
    "take_loads",
    "tell_all",
]
