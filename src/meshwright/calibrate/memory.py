"""Passes over memory: plain copies, the optimizer's, FSDP's; and what goes between a device and its host."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from meshwright.calibrate.clock import Clock
from meshwright.calibrate.sizes import Sizes
from meshwright.parallel import clip_gradients, squared_norm
from meshwright.record.calibration import Figure

# As many parameter tensors as an optimizer's pass goes over here, each a matrix of so many columns.
TENSORS = 8
COLUMNS = 1024
# Of the parameters that are measured on a device, what is measured on its host.
ON_HOST = 16


def measure_copies(clock: Clock, sizes: Sizes) -> Iterator[Figure]:
    """Plain copies."""
    for size_bytes in sizes.copies:
        source = torch.ones(size_bytes // 4, device=clock.device)
        target = torch.empty_like(source)
        yield clock.measure("copy", (size_bytes,), lambda source=source, target=target: target.copy_(source))


def measure_update(clock: Clock, sizes: Sizes) -> Iterator[Figure]:
    """Gradient norm with clipping, and fused AdamW, on fp32 parameters."""
    model = build_parameters(sizes.parameters, clock.device)
    yield clock.measure("clip", (sizes.parameters,), lambda: clip(model))
    optimizer = AdamW(model.parameters(), fused=True)
    yield clock.measure("update", (sizes.parameters,), optimizer.step)


def measure_host_update(clock: Clock, sizes: Sizes) -> Iterator[Figure]:
    """All of it on the host's cores, as with parameters that are offloaded."""
    count = sizes.parameters // ON_HOST
    model = build_parameters(count, torch.device("cpu"))
    optimizer = AdamW(model.parameters(), fused=True)

    def update() -> None:
        clip(model)
        optimizer.step()

    yield clock.measure("host_update", (count,), update, on_host=True)


def build_parameters(count: int, device: torch.device) -> nn.ParameterList:
    """fp32 parameters with gradients."""
    shape = (count // TENSORS // COLUMNS, COLUMNS)
    model = nn.ParameterList(torch.zeros(shape, device=device) for _ in range(TENSORS))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    return model


def clip(model: nn.Module) -> None:
    """The norm, and every gradient by the same factor: as large as it was, so that repeats do not shrink it away."""
    norm = squared_norm(model).sqrt()
    clip_gradients(model, norm, clip_norm=1e9)


def measure_fsdp_copies(clock: Clock, sizes: Sizes, ranks: int) -> Iterator[Figure]:
    """What FSDP does with a group's gradients before they are reduced, and with its parameters once they are gathered:
    rows of each tensor go to the rank that they belong to, and come from there."""
    chunks = max(2, ranks)
    rows = max(1, sizes.parameters // TENSORS // COLUMNS // chunks) * chunks
    gradients = [clock.normal(rows, COLUMNS) for _ in range(TENSORS)]
    elements = TENSORS * rows * COLUMNS
    reduced = torch.empty(chunks, elements // chunks, dtype=torch.float32, device=clock.device)
    # What fully_shard calls; it casts to what gradients are summed in on the way.
    yield clock.measure(
        "copy_in", (elements,), lambda: torch._chunk_cat(gradients, dim=0, num_chunks=chunks, out=reduced)
    )
    gathered = clock.normal(chunks, elements // chunks)
    parameters = [gradient.view(chunks, -1) for gradient in gradients]
    widths = [parameter.shape[1] for parameter in parameters]
    yield clock.measure(
        "copy_out", (elements,), lambda: torch.split_with_sizes_copy(gathered, widths, dim=1, out=parameters)
    )


def measure_host_link(clock: Clock, sizes: Sizes) -> Iterator[Figure]:
    """Pinned memory to the device and back."""
    for size_bytes in sizes.to_host:
        host = torch.ones(size_bytes // 4, pin_memory=True)
        device = torch.empty(size_bytes // 4, device=clock.device)

        def there(host: Tensor = host, device: Tensor = device) -> Tensor:
            return device.copy_(host, non_blocking=True)

        def back(host: Tensor = host, device: Tensor = device) -> Tensor:
            return host.copy_(device, non_blocking=True)

        yield clock.measure("to_device", (size_bytes,), there)
        yield clock.measure("to_host", (size_bytes,), back)
