"""One walk over a step's operators: what autograd runs, what it runs again, and when a thread is inside of any."""

from collections.abc import Mapping, Sequence

from meshwright.account.intervals import Interval, union
from meshwright.record.kineto.marks import REDUCER
from meshwright.record.kineto.trace import Event

ENDLESS = float("inf")

# Autograd's bracket around a node of the backward pass, and the node that keeps a parameter's gradient.
NODE = "autograd::engine::evaluate_function: "
ACCUMULATE = "torch::autograd::AccumulateGrad"
COMPILED_BACKWARD = "CompiledFunctionBackward"
FUNCTIONAL = "_c10d_functional::"
RECORD = "record_param_comms"

# Operators that libraries call with gradients recorded in a backward pass without computing anything again: they show
# data otherwise, or are brackets around what DTensor moves.
NO_WORK = frozenset(
    {
        *("aten::view", "aten::split_with_sizes", "aten::split", "aten::detach", "aten::t", "aten::transpose"),
        *("aten::_has_compatible_shallow_copy_type", "aten::as_strided", "aten::reshape", "aten::expand"),
        *("aten::unsqueeze", "aten::squeeze", "aten::slice", "aten::select", "aten::alias", "aten::chunk"),
        *("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::permute", "aten::narrow", "detach"),
        *("Redistribute", "NestedRedistribute", "_FromTorchTensor", "_ToTorchTensor", "RegisterPostBackwardFunction"),
        *("PythonSubclass", "aten::result_type", "aten::is_pinned", "aten::resolve_conj", "aten::resolve_neg"),
    }
)
# What the walk looks for, by how an operator's name begins.
WANTED = (NODE, FUNCTIONAL, RECORD, REDUCER)


class Node:
    """A node of the backward pass that the walk is inside of, and the operators in it that record gradients.

    plain: others are directly in it too, or a backward pass of its own.
    """

    __slots__ = ("again", "begin_s", "end_s", "name", "plain", "worked")

    def __init__(self, event: Event) -> None:
        self.begin_s, self.end_s = event.start_s, event.end_s
        self.name = event.name.removeprefix(NODE)
        self.plain = self.worked = False
        self.again: list[list[float]] = []
        self.paused()

    def paused(self) -> None:
        """What comes next is another run."""
        self.again.append([ENDLESS, -ENDLESS])

    def run_again(self, operator: Event) -> None:
        """An operator that records gradients, directly in this node: one run with those before it."""
        self.worked = self.worked or operator.name not in NO_WORK
        run = self.again[-1]
        run[0], run[1] = min(run[0], operator.start_s), max(run[1], operator.end_s)


class Walk:
    """What a walk over operators finds, all threads together; intervals are sorted and disjoint.

    backward: inside nodes of the backward pass; recompute: where such a node runs a part of the forward pass again;
    accumulating: in nodes that keep a parameter's gradient, where DistributedDataParallel reduces them;
    functional: in functional collectives, DTensor's; reducing: in its reducer's operators, active: in any operator, by
    thread. autograd: threads that nodes ran on. names: of operators, by what names them in kernels they launched;
    records: of collectives. compiled: backward passes of compiled regions ran. twice: a node of the backward pass
    computed, and all that it computed records gradients, so that what is differentiated again could not be told from
    what is run again.
    """

    def __init__(self, operators: Mapping[str, Sequence[Event]]) -> None:
        self.names: dict[int, str] = {}
        self.records: list[Event] = []
        self.active: dict[str, list[Interval]] = {}
        self.autograd: set[str] = set()
        self.compiled = False
        self._reducing: list[Interval] = []
        self._kinds: dict[str, str] = {}
        self._backward: list[Interval] = []
        self._accumulating: list[Interval] = []
        self._functional: list[Interval] = []
        self._again: list[Interval] = []
        self.twice = False
        for thread, own in operators.items():
            self._walk(thread, own)
        self.names.pop(-1, None)
        self.backward = union(self._backward)
        self.recompute = union(self._again)
        self.accumulating = union(self._accumulating)
        self.functional = union(self._functional)
        self.reducing = union(self._reducing)

    def _walk(self, thread: str, operators: Sequence[Event]) -> None:
        """Operators of one thread, in order of begin, the outer of two first."""
        active: list[Interval] = []
        stack: list[Node] = []
        free = covered = -ENDLESS
        names, kinds = self.names, self._kinds
        for operator in operators:
            start, name, args = operator.start_s, operator.name, operator.args
            if start >= free:
                free = operator.end_s
                active.append((start, free))
            while stack and stack[-1].end_s <= start:
                self._close(stack.pop())
            names[args.external] = name
            kind = kinds.get(name)
            if kind is None:
                kind = kinds[name] = next((begin for begin in WANTED if name.startswith(begin)), "")
            if kind == NODE:
                self.autograd.add(thread)
                if stack:
                    # A backward pass inside of a node: what the node ran again ends here.
                    stack[-1].plain = True
                    stack[-1].paused()
                else:
                    self._backward.append((start, operator.end_s))
                stack.append(Node(operator))
                covered = -ENDLESS
                continue
            if stack:
                node = stack[-1]
                if name != node.name and start >= covered:
                    if args.sequence >= 0:
                        covered = operator.end_s
                        node.run_again(operator)
                    else:
                        node.plain = True
            if kind == FUNCTIONAL:
                self._functional.append((start, operator.end_s))
            elif kind == RECORD:
                self.records.append(operator)
            elif kind == REDUCER:
                self._reducing.append((start, operator.end_s))
        for node in stack:
            self._close(node)
        self.active[thread] = active

    def _close(self, node: Node) -> None:
        self.compiled = self.compiled or node.name == COMPILED_BACKWARD
        if node.name == ACCUMULATE:
            self._accumulating.append((node.begin_s, node.end_s))
        if node.worked and node.plain:
            self._again += [(begin, end) for begin, end in node.again if begin < end]
        elif node.worked:
            # Where nothing is computed without gradients, they are what is differentiated again.
            self.twice = True
