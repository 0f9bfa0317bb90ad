"""The model FLOPs of a step, from a trace of it that tells the shapes of what its operators took.

Nothing is put into the program for that but the profiler. (A dispatch mode, as torch.utils.flop_counter uses, would be
counted with less work, but runs compiled regions uncompiled, and deadlocks when a gloo process group is destroyed whose
collectives ran under it: their thread state holds the mode, which the group's own thread then cannot let go of.)
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, cast

import msgspec

COUNTED = "matrix products, convolutions and attention that PyTorch ran in one step, without what it ran again"
BACKWARD = "autograd::engine::evaluate_function"

# As the profiler names types -> as torch does.
TYPES = {"float": "float32", "double": "float64", "c10::Half": "float16", "c10::BFloat16": "bfloat16"}
# Words in the name of an operator that multiplies matrices: one that has no formula, and holds none that has, makes the
# count incomplete.
MULTIPLIES = frozenset(
    {
        *("mm", "bmm", "addmm", "baddbmm", "matmul", "gemm", "linear", "einsum", "attn", "attention", "sdpa"),
        *("convolution", "conv1d", "conv2d", "conv3d"),
    }
)
WORDS = re.compile(r"[A-Z]?[a-z]+\d*[a-z]*|[A-Z]+|\d+")
# Of these one without a product in it has multiplied by a vector.
HARMLESS = ("aten::linear", "aten::matmul", "aten::einsum")
# Backward nodes of PyTorch's own operators, which do all by such operators again.
GENERATED = re.compile(rf"^{BACKWARD}|Backward\d+$")

Shape = Sequence[int]


class Count(msgspec.Struct, frozen=True, kw_only=True):
    """Of one rank's step. flops: without what backward passes ran again; None where the count would be wrong.

    source: in words, or why there is none. precision: the type of most of them, None where nothing was counted.
    recompute: whether any were run again.
    """

    flops: float | None
    source: str
    precision: str | None = None
    recompute: bool = False


class Arguments(msgspec.Struct, frozen=True, kw_only=True):
    """Of an operator's event, with record_shapes."""

    dims: list[Any] = msgspec.field(name="Input Dims", default_factory=list[Any])
    types: list[Any] = msgspec.field(name="Input type", default_factory=list[Any])
    concrete: list[Any] = msgspec.field(name="Concrete Inputs", default_factory=list[Any])
    sequence: int = msgspec.field(name="Sequence number", default=-1)


class Operator(msgspec.Struct, frozen=True, kw_only=True):
    """An event, as far as it matters here."""

    name: str = ""
    cat: str = ""
    tid: int | str = 0
    ts: float = 0.0
    dur: float = 0.0
    args: Arguments = Arguments()


class Shaped(msgspec.Struct, frozen=True, kw_only=True):
    """A trace."""

    traceEvents: list[Operator] = []


class Node:
    """An operator that has a formula or should have one, or a backward node; `inside`: what of this it holds."""

    def __init__(self, event: Operator, above: "Node | None") -> None:
        self.event = event
        self.above = above
        self.inside: list[Node] = []
        self.backward = event.name.startswith(BACKWARD) or (above is not None and above.backward)

    def over(self) -> Iterator["Node"]:
        """Those that hold it, innermost first."""
        node = self.above
        while node is not None:
            yield node
            node = node.above

    def counts_inside(self) -> list["Node"]:
        """The outermost ones with a formula that it holds."""
        found: list[Node] = []
        for node in self.inside:
            found += [node] if node.event.name in FORMULAS else node.counts_inside()
        return found


def count_flops(path: Path) -> Count:
    """Count the whole trace, which is of one step. Raises OSError, or ValueError where it is no such trace.

    A gradient of a gradient cannot be told from what a backward pass runs again.
    """
    events = msgspec.json.decode(path.read_bytes(), type=Shaped).traceEvents
    operators = [event for event in events if event.cat == "cpu_op"]
    flops: defaultdict[str, float] = defaultdict(float)
    again = 0.0
    uncounted: set[str] = set()
    for node in nodes(operators):
        name, args = node.event.name, node.event.args
        if name not in FORMULAS:
            if is_missing(node):
                uncounted.add(name)
            continue
        if any(above.event.name in WHOLE and above.event.name != name for above in node.over()):
            continue
        inner = node.counts_inside() if name not in WHOLE else [n for n in node.counts_inside() if n.event.name == name]
        if len(inner) > 1:
            uncounted.add(f"{name} over several others")
        if inner:
            # A DTensor's operator, around the one on this rank's part.
            continue
        try:
            made = FORMULAS[name](args)
        except (LookupError, TypeError, ValueError):
            uncounted.add(name)
            continue
        # Operators of plain backward passes have no sequence number: they record no gradients.
        if node.backward and args.sequence >= 0:
            again += made
        else:
            flops[dtype_of(args)] += made
    if uncounted:
        return Count(flops=None, source=f"not counted: no formula for {', '.join(sorted(uncounted)[:3])}")
    if not sum(flops.values()):
        return Count(flops=None, source="not counted: PyTorch ran no matrix product in the step that was watched")
    most = max(flops, key=lambda dtype: flops[dtype])
    return Count(flops=sum(flops.values()), source=COUNTED, precision=most, recompute=again > 0)


def nodes(operators: Sequence[Operator]) -> list[Node]:
    """Those that matter, each under the one that holds it, thread by thread."""
    found: list[Node] = []
    stacks: defaultdict[int | str, list[Node]] = defaultdict(list)
    for event in sorted(operators, key=lambda event: (event.ts, -event.dur)):
        if event.name not in FORMULAS and not event.name.startswith(BACKWARD) and not multiplies(event.name):
            continue
        stack = stacks[event.tid]
        while stack and stack[-1].event.ts + stack[-1].event.dur <= event.ts:
            stack.pop()
        node = Node(event, stack[-1] if stack else None)
        if stack:
            stack[-1].inside.append(node)
        stack.append(node)
        found.append(node)
    return found


def multiplies(name: str) -> bool:
    """Whether an operator's name says that it multiplies matrices."""
    return not MULTIPLIES.isdisjoint(word.lower() for word in WORDS.findall(name))


def is_missing(node: Node) -> bool:
    """Whether an operator without a formula multiplies matrices by itself."""
    name = node.event.name
    if name in HARMLESS or GENERATED.search(name) or node.inside:
        return False
    return not any(above.event.name in FORMULAS for above in node.over())


def dtype_of(args: Arguments) -> str:
    """The type of an operator's last floating-point matrix."""
    types = [str(t) for t, dims in zip(args.types, args.dims, strict=False) if dims and "int" not in str(t)]
    last = types[-1] if types else ""
    return TYPES.get(last, last.removeprefix("c10::").lower())


# --- Formulas: two FLOPs for each multiplication and addition, masks ignored ------------------------------------------


def shape(args: Arguments, place: int) -> Shape:
    """Of an input that is a tensor; raises ValueError for another."""
    dims = args.dims[place]
    if not isinstance(dims, list) or not all(isinstance(size, int) for size in cast(list[object], dims)):
        raise ValueError
    return cast(list[int], dims)


def product_flops(first: int) -> Callable[[Arguments], float]:
    """Of two matrices, or as many pairs of them, from input `first` on."""

    def flops(args: Arguments) -> float:
        left, right = shape(args, first), shape(args, first + 1)
        if left[-1] != right[-2]:
            raise ValueError
        return 2.0 * prod(left) * right[-1]

    return flops


def grouped_flops(args: Arguments) -> float:
    """Of a mixture's experts: rows or columns of one operand are dealt out to the matrices of the other."""
    left, right = shape(args, 0), shape(args, 1)
    groups = left[0] if len(left) == len(right) == 3 else 1
    return 2.0 * groups * left[-2] * left[-1] * right[-1]


def attention_flops(first: int, times: int) -> Callable[[Arguments], float]:
    """Two products of query, key and value, from input `first` on; backward `times` 2, for a fused kernel's making the
    scores once more is recompute."""

    def flops(args: Arguments) -> float:
        (*batch, queries, width), key, value = (shape(args, first + place) for place in range(3))
        return times * 2.0 * prod(batch) * queries * key[-2] * (width + value[-1])

    return flops


def flat_attention_flops(first: int, times: int) -> Callable[[Arguments], float]:
    """The same where heads stand behind the sequence, (batch, sequence, heads, width); packed sequences raise."""

    def flops(args: Arguments) -> float:
        (batch, queries, heads, width), key, value = (shape(args, first + place) for place in range(3))
        # With the places of sequences' ends, their lengths are not in the shapes.
        if any(isinstance(dims, list) and len(cast(list[int], dims)) == 1 for dims in args.dims[first + 3 : first + 8]):
            raise ValueError
        return times * 2.0 * batch * heads * queries * key[1] * (width + value[-1])

    return flops


def numbers(args: Arguments, place: int) -> list[int]:
    """A list of whole numbers among the inputs, written "[1, 1]"."""
    return [int(word) for word in re.findall(r"-?\d+", str(args.concrete[place]))]


def convolution_flops(args: Arguments) -> float:
    """Forward."""
    given, weight = shape(args, 0), shape(args, 1)
    if str(args.concrete[6]).lower() == "true":
        return 2.0 * given[0] * prod(given[2:]) * prod(weight)
    each = zip(given[2:], weight[2:], numbers(args, 3), numbers(args, 4), numbers(args, 5), strict=True)
    made = [
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, dilation in each
    ]
    return 2.0 * given[0] * prod(made) * prod(weight)


def convolution_backward_flops(args: Arguments) -> float:
    """As much for the input's gradient as forward, if it is asked for, and for the weight's."""
    gradient, given, weight = (shape(args, place) for place in range(3))
    places = given[2:] if str(args.concrete[7]).lower() == "true" else gradient[2:]
    asked = re.findall(r"true|false|0|1", str(args.concrete[10]).lower())
    return 2.0 * given[0] * prod(places) * prod(weight) * sum(word in ("true", "1") for word in asked[:2])


KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
# Operators whose inner ones do the same work again under other names.
WHOLE: Mapping[str, Callable[[Arguments], float]] = {
    "aten::convolution": convolution_flops,
    "aten::convolution_backward": convolution_backward_flops,
    **{f"aten::_scaled_dot_product_{kernel}": attention_flops(0, 1) for kernel in KERNELS},
    **{f"aten::_scaled_dot_product_{kernel}_backward": attention_flops(1, 2) for kernel in KERNELS},
}
FORMULAS: Mapping[str, Callable[[Arguments], float]] = {
    **WHOLE,
    "aten::mm": product_flops(0),
    "aten::bmm": product_flops(0),
    "aten::addmm": product_flops(1),
    "aten::baddbmm": product_flops(1),
    "aten::_scaled_mm": product_flops(0),
    "aten::_grouped_mm": grouped_flops,
    "aten::_scaled_grouped_mm": grouped_flops,
    "aten::_flash_attention_forward": flat_attention_flops(0, 1),
    "aten::_flash_attention_backward": flat_attention_flops(1, 2),
    "aten::_efficient_attention_forward": flat_attention_flops(0, 1),
    "aten::_efficient_attention_backward": flat_attention_flops(1, 2),
}
