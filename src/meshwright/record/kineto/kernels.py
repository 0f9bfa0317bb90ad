"""Kernels by what they are for: told by the names that libraries give them, and by the operators that launched them."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from meshwright.record.detail import KernelGroup

# The first pattern that a kernel's or its operator's name holds, ignoring case.
PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (purpose, re.compile(words, re.IGNORECASE))
    for purpose, words in (
        ("communication", r"nccl|rccl|gloo|c10d::"),
        ("optimizer", r"multi_tensor|fused_?adam|adamw|foreach|lpnormfunctor"),
        ("attention", r"flash|fmha|attention|softmax_warp|sdpa|flex_attn|tem_fused_.*attention"),
        (
            "matrix products",
            r"gemm|nvjet|cutlass|cijk_|wgmma|matmul|_mm_|triton_tem|splitk|cublas|aten::(add|b|baddb)?mm\b|aten::linear",
        ),
        # Compiled ones bear the names of all that was fused into them.
        ("normalisation and element-wise", r"^triton_(?!.*(nll_loss|softmax|cross_entropy|embedding))"),
        ("copies", r"memcpy|memset|catarray|copy_|split_with_sizes|aten::cat|chunk_cat|fillfunctor|aten::_to_copy"),
        ("loss and embedding", r"cross_entropy|nll_loss|softmax|embedding|indexing|gather"),
        ("normalisation and element-wise", r"elementwise|norm|reduce|triton_|silu|gelu|mul|add|rope|rotary|aten::"),
    )
)
OTHER = "other"


def purpose_of(name: str, operator: str, *, updating: bool) -> str:
    """What a kernel is for. operator: what launched it, "" where unknown; updating: in the optimizer's phase."""
    if updating:
        return "optimizer"
    for text in (name, operator):
        for purpose, pattern in PATTERNS:
            if text and pattern.search(text):
                return purpose
    return OTHER


def group_kernels(found: Iterable[tuple[str, str, bool, float]]) -> tuple[KernelGroup, ...]:
    """Kernels (name, operator, updating, seconds) by purpose, the one that took most first."""
    known: dict[tuple[str, str, bool], str] = {}
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    count: dict[str, int] = defaultdict(int)
    for name, operator, updating, taken in found:
        key = (name, operator, updating)
        purpose = known.get(key)
        if purpose is None:
            purpose = known[key] = purpose_of(name, operator, updating=updating)
        seconds[purpose][name] += taken
        count[purpose] += 1
    return purpose_groups(seconds, count)


def purpose_groups(seconds: Mapping[str, Mapping[str, float]], count: Mapping[str, int]) -> tuple[KernelGroup, ...]:
    """Purposes with the seconds of each of their kernels and how many ran, the one that took most first."""
    groups = [
        KernelGroup(
            purpose=purpose,
            seconds=sum(names.values()),
            count=count[purpose],
            busiest=max(names, key=lambda name: names[name]),
        )
        for purpose, names in seconds.items()
    ]
    return tuple(sorted(groups, key=lambda group: -group.seconds))


def own_seconds(spans: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds of each span without those inside it; by begin, the outer of two first."""
    own = [end - start for start, end in spans]
    stack: list[int] = []
    for at, (start, end) in enumerate(spans):
        while stack and spans[stack[-1]][1] <= start:
            stack.pop()
        if stack:
            own[stack[-1]] -= min(end, spans[stack[-1]][1]) - start
        stack.append(at)
    return own
