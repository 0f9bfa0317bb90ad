"""What a block does not keep for its backward pass but computes again, and how it is compiled around that."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from meshwright.models import MixtureBlock
from meshwright.parallel.exchange import EXCHANGE
from meshwright.parallel.ring import RING_ATTENTION
from meshwright.record.kineto import PREFIX
from meshwright.spec import Layout

Forward = Callable[..., Any]
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

aten, functional = torch.ops.aten, torch.ops._c10d_functional
# Results that selective recompute keeps: of matrix products, attention and transfers, the dear ones, and of the sort
# that puts a mixture's tokens in the order of their experts.
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
        RING_ATTENTION,
        EXCHANGE,
        functional.all_to_all_single.default,
        functional.all_reduce.default,
        aten.sort.stable,
        aten._grouped_mm.default,
    }
)
HOST = torch.device("cpu")


def prepare_block(block: nn.Module, layout: Layout, index: int, *, compiled: bool, random: bool = False) -> None:
    """Have block `index` compute again what `layout.recompute` says, compiled or not.

    random: the block draws random numbers, and must draw the same ones when it is computed again.

    Whole blocks are computed again from outside the compiled function, so that the second run can be told apart and
    measured. Selective recompute must be known to the compiler, which works it into the backward pass's kernels.
    A block with a mixture is compiled in the parts before and after its experts. These stay as they are: how many rows
    go to whom is data, and FSDP, which gathers experts on their own, must not be computed again.
    """
    if isinstance(block, MixtureBlock):
        block.before_experts = inner_forward(block.before_experts, layout, compiled=compiled, random=random)
        block.after_experts = inner_forward(block.after_experts, layout, compiled=compiled, random=random)
        experts = block.feed_forward.experts
        experts.forward = inner_forward(experts.forward, layout, compiled=False, random=random)
    else:
        block.forward = inner_forward(block.forward, layout, compiled=compiled, random=random)
    if layout.recompute == "full" or (isinstance(layout.recompute, int) and index < layout.recompute):
        block.forward = partial(again, block.forward, announced_contexts, random)


def inner_forward(forward: Forward, layout: Layout, *, compiled: bool, random: bool) -> Forward:
    """A function with selective recompute where the layout says so, compiled or not."""
    if layout.recompute == "selective":
        contexts = selective_contexts if compiled else announced_selective_contexts
        forward = partial(again, forward, contexts, random)
    return torch.compile(forward) if compiled else forward


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


def keep_the_dear(_context: Any, operator: Any, *_arguments: Any, **options: Any) -> CheckpointPolicy:
    """Selective recompute's policy."""
    # What a mixture reads on the host, how many rows go where: to ask the device again would be to wait for it again.
    read = operator is aten._to_copy.default and options.get("device") == HOST
    return CheckpointPolicy.MUST_SAVE if read or operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
