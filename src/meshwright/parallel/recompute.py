"""What a block does not keep for its backward pass but computes again, and how it is compiled around that."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.profiler import record_function
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from meshwright.record.kineto import PREFIX
from meshwright.spec import Layout

Forward = Callable[..., Any]
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

aten, functional = torch.ops.aten, torch.ops._c10d_functional
# Results that selective recompute keeps: of matrix products, attention and transfers, the dear ones.
KEPT = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.linear.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_attention_math.default,
        aten._scaled_dot_product_fused_attention_overrideable.default,
        torch.ops.higher_order.flex_attention,
        functional.all_gather_into_tensor.default,
        functional.reduce_scatter_tensor.default,
        functional.all_to_all_single.default,
        aten._grouped_mm.default,
    }
)


def block_forward(forward: Forward, layout: Layout, index: int, *, compiled: bool, random: bool = False) -> Forward:
    """The forward function of block `index`, with what `layout.recompute` says, compiled or not.

    random: the block draws random numbers, and must draw the same ones when it is computed again.

    Whole blocks are computed again from outside the compiled function, so that the second run can be told apart and
    measured. Selective recompute must be known to the compiler, which works it into the backward pass's kernels.
    """
    if layout.recompute == "selective":
        contexts = selective_contexts if compiled else announced_selective_contexts
        forward = partial(again, forward, contexts, random)
    if compiled:
        forward = torch.compile(forward)
    recomputed = layout.recompute == "full" or (isinstance(layout.recompute, int) and index < layout.recompute)
    return partial(again, forward, announced_contexts, random) if recomputed else forward


def again(forward: Forward, contexts: Callable[[], Contexts], random: bool, *inputs: Any, **named: Any) -> Any:
    """Run `forward`, and once more in the backward pass; the generator's state is kept only where it is needed."""
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=random, context_fn=contexts, **named)


def announced_contexts() -> Contexts:
    """Around the first run, and around the second, which is named for the profiler."""
    return nullcontext(), record_function(PREFIX + "recompute")


def selective_contexts() -> Contexts:
    """Keep in the first run, and give back in the second, what the policy keeps."""
    return create_selective_checkpoint_contexts(keep_the_dear)


def announced_selective_contexts() -> Contexts:
    """Both."""
    first, second = selective_contexts()
    return first, announced(second)


@contextmanager
def announced(context: AbstractContextManager[Any]) -> Iterator[None]:
    """`context`, named for the profiler."""
    with record_function(PREFIX + "recompute"), context:
        yield


def keep_the_dear(_context: Any, operator: Any, *_arguments: Any, **_options: Any) -> CheckpointPolicy:
    """Selective recompute's policy."""
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
