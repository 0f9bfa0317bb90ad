"""The model FLOPs of one step of any program, counted while it runs."""

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

# Words in the name of an operator that multiplies matrices: one that has no formula makes the count incomplete.
MULTIPLIES = re.compile(r"(^|_)(mm|bmm|addmm|baddbmm|matmul|linear|conv\d?d?|convolution|attn|attention|einsum)(_|$)")
# Dispatched without running on their own, or small: they match by name only.
HARMLESS = re.compile(r"^(aten\.(t|transpose|_reshape|_unsafe_view)|prim\.)")


class Count(msgspec.Struct, frozen=True, kw_only=True):
    """Of one rank's step. flops: without what backward passes ran again; None where the count would be wrong.

    source: in words, or why there is none. precision: of most of them; None where nothing was counted. recompute:
    whether any were run again.
    """

    flops: float | None
    source: str
    precision: str | None = None
    recompute: bool = False


class FlopCount(TorchDispatchMode):
    """Counts what passes through PyTorch's dispatcher, by the formulas of torch.utils.flop_counter.

    That module's own mode cannot serve here: it counts a DTensor as if each rank computed the whole of it, has no
    formula for attention on a CPU, puts hooks on every module, and does not tell what a backward pass runs again.
    Under any such mode compiled regions run uncompiled, with more memory and other rounding: see compiled().
    """

    # Or an operator like flex_attention raises under the mode.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._flops: defaultdict[str, float] = defaultdict(float)
        self._again = 0.0
        self._uncounted: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # What DTensor runs on shapes alone, to learn how its result is split.
        if any(issubclass(kind, FakeTensor) for kind in types):
            return func(*args, **(kwargs or {}))
        # A DTensor or another wrapper is asked to run its operator on what it wraps, which comes by here then.
        if any(kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl for kind in types):
            return NotImplemented
        made = func(*args, **(kwargs or {}))
        try:
            self._add(func, args, kwargs or {}, made)
        # What a formula does not expect must not end the program that is being counted.
        except Exception:
            self._uncounted.add(str(func))
        return made

    def _add(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], made: Any) -> None:
        is_operator = isinstance(func, torch._ops.OpOverload)
        name = str(func.overloadpacket) if is_operator else str(func)
        formula = FORMULAS.get(name) or flop_registry.get(func.overloadpacket if is_operator else func)
        if formula is None:
            short = name.rpartition(".")[2]
            if not HARMLESS.match(name) and (not is_operator or MULTIPLIES.search(short)):
                self._uncounted.add(name)
            return
        operands = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()]
        if any(operand.is_meta for operand in operands):
            return
        flops = float(formula(*args, **kwargs, out_val=made))
        # Plain backward passes record no gradients; what they run again for activation checkpointing does.
        if torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled():
            self._again += flops
        else:
            self._flops[str(operands[-1].dtype).removeprefix("torch.") if operands else ""] += flops

    def close(self) -> bool:
        """Leave the mode; False where the program is inside of one that it entered later, so that this one stays."""
        if _get_current_dispatch_mode() is not self:
            return False
        self.__exit__(None, None, None)
        return True

    def count(self) -> Count:
        """What was counted."""
        total = sum(self._flops.values())
        if self._uncounted:
            names = ", ".join(sorted(self._uncounted))
            return Count(flops=None, source=f"not counted: there is no formula for {names}")
        if not total:
            return Count(flops=None, source="not counted: the step ran no matrix product that PyTorch dispatches")
        return Count(
            flops=total,
            source="matrix products, convolutions and attention that PyTorch ran in one step, without recompute",
            precision=max(self._flops, key=lambda dtype: self._flops[dtype]),
            recompute=self._again > 0,
        )


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> float:
    """Forward: two products, over the full square whatever the mask."""
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def attention_backward_flops(_gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> float:
    """Backward: two products for each. (What a fused kernel makes once more to save memory is recompute.)"""
    return 2 * sdpa_flop_count(query.shape, key.shape, value.shape)


def grouped_flops(left: Any, right: Any, *_: Any, **__: Any) -> float:
    """Products of a mixture's experts: rows or columns of one operand are dealt out to the matrices of the other."""
    groups = left.shape[0] if left.dim() == right.dim() == 3 else 1
    return 2.0 * groups * left.shape[-2] * left.shape[-1] * right.shape[-1]


# Those that torch has none for, and those of backward passes for which it counts what the kernel makes again.
FORMULAS: Mapping[str, Callable[..., float]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": attention_flops,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": attention_backward_flops,
    "aten._scaled_dot_product_flash_attention_backward": attention_backward_flops,
    "aten._scaled_dot_product_efficient_attention_backward": attention_backward_flops,
    "aten._scaled_dot_product_cudnn_attention_backward": attention_backward_flops,
    "aten._grouped_mm": grouped_flops,
    "aten._scaled_grouped_mm": grouped_flops,
}


def compiled() -> bool:
    """Whether torch.compile has compiled anything in this process."""
    # Asked of the module only where the program has loaded it, which takes seconds.
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and dynamo.counters["stats"]["unique_graphs"] > 0


def compile_seconds() -> float:
    """Seconds that torch.compile has taken in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return 0.0
    spent = dynamo.cumulative_time_spent_ns
    return (spent.get("entire_frame_compile", 0.0) + spent.get("entire_backward_compile", 0.0)) * 1e-9
