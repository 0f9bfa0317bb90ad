"""What a JAX program says of itself in program.json."""

from collections.abc import Sequence

import jax
import jaxlib
import msgspec

from meshwright.jax.watch import Called
from meshwright.record import Program
from meshwright.spec.hardware import match_gpu


def describe_program(name: str, trainer: str, tokens_per_step: int | None, flops_per_step: float | None) -> Program:
    """The program as far as JAX knows it before the first step. flops_per_step: of all devices together, if given."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    return Program(
        name=name,
        trainer=trainer,
        versions={"jax": jax.__version__, "jaxlib": jaxlib.__version__},
        device=device.device_kind,
        kind={"cpu": "cpu", "gpu": "cuda"}.get(device.platform, "xla"),
        world_size=jax.process_count(),
        memory_bytes=float(stats["bytes_limit"]) if "bytes_limit" in stats else None,
        # A bucket is a device's time, and the devices of a process work side by side.
        flops_per_step=flops_per_step / jax.device_count() if flops_per_step is not None else None,
        flops_from="not counted" if flops_per_step is None else "given, divided by the number of devices",
        tokens_per_step=tokens_per_step,
    )


def with_flops(program: Program, called: Sequence[Called]) -> Program:
    """The same with what was counted in one step's calls: a device's share."""
    counted = [call.counted for call in called if call.counted is not None]
    unknown = [one.why for one in counted if one.flops is None]
    flops = sum(call.counted.flops / call.devices for call in called if call.counted and call.counted.flops)
    largest = max(counted, key=lambda one: one.flops or 0.0, default=None)
    precision = (largest.precision if largest is not None else "") or None
    functions = ", ".join(dict.fromkeys(call.function for call in called))
    if program.flops_per_step is not None:
        flops, why = program.flops_per_step, program.flops_from
    elif not counted:
        flops, why = 0.0, "not counted: no program of the step is watched"
    elif unknown:
        flops, why = 0.0, f"not counted: {unknown[0]}; give flops_per_step"
    else:
        why = f"matrix products in the trace of {functions}, one device's share"
    return msgspec.structs.replace(
        program,
        flops_per_step=flops or None,
        flops_from=why,
        precision=precision,
        peak_flops_per_s=peak_of(program.device, precision),
        recompute=any(one.recompute for one in counted),
    )


def peak_of(device: str, precision: str | None) -> float | None:
    """One device's peak at the precision of its matrix products; None where the hardware table does not say it.

    Of fp32 it does not: JAX multiplies fp32 on the tensor cores by default, at a rate that the table does not hold.
    """
    row = match_gpu(device)
    if row is None or precision not in ("bf16", "fp16"):
        return None
    return (row.device.peak_bf16_flops_per_s if precision == "bf16" else row.device.peak_flops_per_s("bf16")) or None
