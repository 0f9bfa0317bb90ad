"""A program that records itself without being ours: what it says of itself, in program.json of its run folder."""

import msgspec


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """Another trainer's run, as its recorder knows it; None is what it does not know.

    trainer: in words, with its version. versions: of the libraries beneath it. device: as its framework names it;
    kind: cpu, cuda or xla. memory_bytes: one device's. peak_flops_per_s: one device's, at the precision of most of its
    matrix products. parameters: of the whole model. flops_per_step: model FLOPs of a step, forward and backward, mean
    over ranks; flops_from: where that number comes from, or why there is none. tokens_per_step: of all ranks.
    recompute: whether FLOPs that backward passes run again were seen while they were counted.
    """

    name: str
    trainer: str
    versions: dict[str, str]
    device: str
    kind: str
    world_size: int
    memory_bytes: float | None = None
    peak_flops_per_s: float | None = None
    precision: str | None = None
    parameters: int | None = None
    flops_per_step: float | None = None
    flops_from: str = "not counted"
    tokens_per_step: int | None = None
    recompute: bool = False
