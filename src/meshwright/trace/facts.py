"""What a program is, as far as its recorder can tell: the words of program.json."""

import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from meshwright.spec import Precision
from meshwright.spec.hardware import match_gpu

LIBRARIES = ("torch", "transformers", "accelerate", "lightning", "torchtitan", "deepspeed")
# Words of torch's types -> the account's; fp16 has the rate of bf16 on every device of the table.
PRECISIONS: dict[str, Precision] = {"bfloat16": "bf16", "float16": "bf16", "float32": "fp32"}


def library_versions() -> dict[str, str]:
    """Of those that the program has loaded."""
    loaded = [name for name in LIBRARIES if name in sys.modules]
    return {"python": platform.python_version(), **{name: version(name) for name in loaded}}


def device_of(models: Sequence[nn.Module], parameters: Sequence[Tensor]) -> torch.device:
    """Where the training runs: on the device of the parameters, or of this process's GPU if they wait in memory."""
    devices = {p.device for model in models for p in model.parameters()} | {p.device for p in parameters}
    if on_gpu := sorted((d for d in devices if d.type == "cuda"), key=str):
        return on_gpu[0]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """As the driver names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def device_memory_bytes(device: torch.device) -> float | None:
    """One GPU's."""
    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def peak_flops_per_s(device: torch.device, dtype: str | None) -> float | None:
    """Datasheet peak at a type's rate; None where the table has none for it. fp32 with TF32 allowed has none either."""
    precision = PRECISIONS.get(dtype or "")
    row = match_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if precision is None or row is None:
        return None
    if precision == "fp32" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return None
    if dtype == "bfloat16":
        return row.device.peak_bf16_flops_per_s or None
    return row.device.peak_flops_per_s(precision) or None


def parameter_count(models: Sequence[nn.Module], parameters: Sequence[Tensor]) -> int | None:
    """Of the whole model as this rank sees it; None where FSDP1 has flattened and cut it."""
    if any(isinstance(part, FullyShardedDataParallel) for model in models for part in model.modules()):
        return None
    # A DTensor's numel is the whole tensor's.
    return sum(p.numel() for p in parameters)
