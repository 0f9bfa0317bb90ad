"""What the host takes to launch a model's work, in a model too small for the device to be waited for."""

from collections.abc import Iterator

import torch

from meshwright.calibrate.clock import Clock
from meshwright.models import build_model, token_loss
from meshwright.parallel import build_mesh
from meshwright.parallel.shard import apply_shard
from meshwright.record.calibration import Figure
from meshwright.spec import Layout, ModelSpec

LAYERS = 6
SPEC = ModelSpec(layers=LAYERS, d_model=32, heads=2, kv_heads=1, head_dim=16, feed_forward=64, vocabulary=64)
TOKENS = 8


def measure_launches(clock: Clock, ranks: int) -> Iterator[Figure]:
    """One operator; a microbatch's passes operator by operator, compiled on a GPU, and with FSDP around each block."""
    number = torch.zeros(1, device=clock.device)
    yield clock.measure("launch", (1,), lambda: number.add_(1), on_host=True)
    compiled = clock.device.type == "cuda"
    yield measure_passes(clock, "host.eager", ranks, compiled=False, sharded=False)
    if compiled:
        yield measure_passes(clock, "host.compiled", ranks, compiled=True, sharded=False)
    yield measure_passes(clock, "host.sharded", ranks, compiled=compiled, sharded=True)


def measure_passes(clock: Clock, name: str, ranks: int, *, compiled: bool, sharded: bool) -> Figure:
    """Forward and backward of one microbatch, until the last of it is launched."""
    precision = "fp32" if clock.device.type == "cpu" else "bf16"
    model = build_model(SPEC, device="meta")
    units = list(model.blocks.values())
    for unit in units:
        if compiled:
            unit.forward = torch.compile(unit.forward, dynamic=False)
    if sharded:
        # Each rank has a pipeline stage to itself, as it were, so that nothing is sent.
        mesh = build_mesh(Layout(pipeline=ranks), clock.device)
        tail = [part for part in (model.norm, model.head) if part is not None]
        apply_shard(model, mesh, Layout(precision=precision), units, tail)
    elif clock.device.type == "cuda":
        model.to(clock.dtype)
    model.to_empty(device=clock.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64, device=clock.device)

    def passes() -> None:
        token_loss(model(tokens), tokens).backward()

    return clock.measure(name, (LAYERS,), passes, on_host=True)
