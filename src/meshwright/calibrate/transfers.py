"""Collectives over sizes and placements, and compute beside one of them."""

from collections.abc import Callable, Iterator, Sequence

import msgspec
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from meshwright.calibrate.clock import Clock
from meshwright.calibrate.sizes import Sizes
from meshwright.parallel import join_group
from meshwright.record.calibration import Figure, Place
from meshwright.spec import Collective

# Products that run beside a gather: together shorter than it is.
BESIDE = 4


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """groups: of ranks, which transfer at the same time."""

    place: Place
    groups: list[list[int]]

    def members(self, rank: int) -> list[int]:
        """The group that a rank is in; itself alone where it is in none."""
        return next((group for group in self.groups if rank in group), [rank])


def placements(ranks: int, per_node: int) -> list[Placement]:
    """Whole nodes; neighbours two by two, where a node has more; and ranks of equal number on each node."""
    nodes = [list(range(first, first + per_node)) for first in range(0, ranks, per_node)]
    pairs = [node[i : i + 2] for node in nodes for i in range(0, per_node - 1, 2)]
    across = [list(range(number, ranks, per_node)) for number in range(per_node)]
    found: list[Placement] = []
    if per_node > 1:
        found.append(Placement(place="node", groups=nodes))
    if per_node > 2:
        found.append(Placement(place="pairs", groups=pairs))
    if len(nodes) > 1:
        found.append(Placement(place="across", groups=across))
    return found


def measure_collectives(clock: Clock, sizes: Sizes, per_node: int) -> Iterator[Figure]:
    """Every kind in every placement. On a CPU each comes after some work, as in training: threads that pass parts on
    wait for cores that compute, and are not found waiting."""
    x, weight = (clock.normal(sizes.products[0][side], sizes.products[0][1]) for side in (0, 2))
    before = (lambda: F.linear(x, weight)) if clock.device.type == "cpu" else None
    for placement in placements(dist.get_world_size(), per_node):
        group = join_group(placement.groups)
        members = placement.members(dist.get_rank())
        for size_bytes in sizes.collectives:
            for kind, run in build_collectives(clock, size_bytes, members, group).items():
                yield clock.measure(
                    kind, (size_bytes,), run, before=before, ranks=len(placement.groups[0]), place=placement.place
                )


def build_collectives(
    clock: Clock, size_bytes: int, members: Sequence[int], group: dist.ProcessGroup | None
) -> dict[Collective, Callable[[], object]]:
    """One of each kind over this rank's group, of so many bytes in whole; nothing to do where it is in none."""
    ranks = len(members)
    elements = max(1, size_bytes // 4 // ranks) * ranks
    whole, other = (torch.ones(elements, device=clock.device) for _ in range(2))
    share = torch.ones(elements // ranks, device=clock.device)
    if group is None:
        return dict.fromkeys(("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"), do_nothing)
    return {
        # A sum of ones grows with each repeat, and must not grow out of fp32.
        "all_reduce": lambda: dist.all_reduce(whole, dist.ReduceOp.MAX, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, share, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(share, whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(other, whole, group=group),
        "send": lambda: pass_on(whole, members, group),
    }


def do_nothing() -> None:
    """What a rank does that has no part in a placement."""


def pass_on(whole: Tensor, members: Sequence[int], group: dist.ProcessGroup) -> None:
    """From the first of the group to the second, from the third to the fourth, and so on."""
    own = list(members).index(dist.get_rank())
    if own % 2:
        dist.recv(whole, members[own - 1], group=group)
    elif own + 1 < len(members):
        dist.send(whole, members[own + 1], group=group)


def measure_beside(clock: Clock, sizes: Sizes) -> Iterator[Figure]:
    """Products alone, a gather alone, and the products while the gather runs."""
    rows, inner, columns = sizes.beside
    x, weight = clock.normal(rows, inner), clock.normal(columns, inner)
    ranks = dist.get_world_size()
    share = torch.ones(sizes.beside_bytes // 4 // ranks, device=clock.device)
    whole = torch.empty(share.numel() * ranks, device=clock.device)
    running: list[dist.Work] = []

    def gather() -> None:
        work = dist.all_gather_into_tensor(whole, share, async_op=True)
        assert work is not None
        running.append(work)

    def compute() -> None:
        for _ in range(BESIDE):
            F.linear(x, weight)

    def wait() -> None:
        running.pop().wait()

    def gather_alone() -> None:
        gather()
        wait()

    yield clock.measure("beside.gather", (sizes.beside_bytes,), gather_alone, ranks=ranks)
    yield clock.measure("beside.alone", sizes.beside, compute, after=do_nothing)
    yield clock.measure("beside.together", sizes.beside, compute, before=gather, after=wait, ranks=ranks)
