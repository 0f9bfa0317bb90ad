"""All figures of a machine, in the order in which they are measured on all of its ranks together."""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch.cuda import nccl

from meshwright.calibrate.clock import Clock
from meshwright.calibrate.host import measure_launches
from meshwright.calibrate.kernels import (
    measure_attention,
    measure_blocks,
    measure_flash,
    measure_loss,
    measure_products,
    measure_scores,
)
from meshwright.calibrate.memory import (
    measure_copies,
    measure_fsdp_copies,
    measure_host_link,
    measure_host_update,
    measure_update,
)
from meshwright.calibrate.sizes import Sizes, sizes_for
from meshwright.calibrate.transfers import measure_beside, measure_collectives
from meshwright.record.calibration import Calibration, Figure, Request

Part = tuple[str, Callable[[], Iterator[Figure]]]


def measure_machine(request: Request, device: torch.device) -> Calibration:
    """What this rank and all others measure together; each of them has all of it."""
    torch.manual_seed(0)
    cluster = request.cluster
    # As training shares the cores, on a GPU's host those of parameters that are offloaded.
    cores = os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // cluster.devices_per_node))
    sizes = sizes_for(cluster.device, quick=request.quick)
    sharing = max(1.0, cluster.devices_per_node / cores) if device.type == "cpu" else 1.0
    clock = Clock(device=device, share_s=sizes.share_s, begun_s=time.monotonic(), sharing=sharing)
    figures: list[Figure] = []
    missing: list[str] = []
    for name, measure in parts_of(clock, sizes, cluster.devices_per_node):
        if dist.get_rank() == 0:
            print(f"measuring {name}", file=sys.stderr, flush=True)
        try:
            # Collectives' new names, which torch 2.13 asks for, are not in 2.11 yet.
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                figures += measure()
        except RuntimeError as error:
            # Other devices of the kind have no such kernel either: all ranks come to the same end.
            if "No available kernel" not in str(error):
                raise
            missing.append(f"{name}: no kernel for this device")
        if device.type == "cuda":
            torch.cuda.empty_cache()
            # Else the next size of a function that was compiled is compiled for all sizes, which training does not.
            torch.compiler.reset()
    gpu = device.type == "cuda"
    return Calibration(
        device=torch.cuda.get_device_name(device) if gpu else "",
        ranks=dist.get_world_size(),
        nodes=cluster.nodes,
        torch=str(torch.__version__),
        cuda=(torch.version.cuda or "") if gpu else "",
        nccl=".".join(map(str, nccl.version())) if gpu else "",
        figures=tuple(figures),
        missing=tuple(missing),
    )


def parts_of(clock: Clock, sizes: Sizes, per_node: int) -> list[Part]:
    """What is measured, each under the name that is shown while it lasts."""
    ranks = dist.get_world_size()
    parts: list[Part] = [
        ("matrix products", lambda: measure_products(clock, sizes)),
        ("attention", lambda: measure_attention(clock, sizes)),
        ("attention with its scores in memory", lambda: measure_scores(clock, sizes)),
        ("memory bandwidth", lambda: measure_copies(clock, sizes)),
        ("blocks", lambda: measure_blocks(clock, sizes)),
        ("the loss", lambda: measure_loss(clock, sizes)),
        ("the optimizer", lambda: measure_update(clock, sizes)),
        ("copies around transfers", lambda: measure_fsdp_copies(clock, sizes, ranks)),
        ("launches", lambda: measure_launches(clock, ranks)),
    ]
    if clock.device.type == "cuda":
        parts += [
            ("FlashAttention", lambda: measure_flash(clock, sizes)),
            ("transfers between device and host", lambda: measure_host_link(clock, sizes)),
            ("the optimizer on the host", lambda: measure_host_update(clock, sizes)),
        ]
    if ranks > 1:
        parts += [
            ("collectives", lambda: measure_collectives(clock, sizes, per_node)),
            ("products beside a gather", lambda: measure_beside(clock, sizes)),
        ]
    return parts
