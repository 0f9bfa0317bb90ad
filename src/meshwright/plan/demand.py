"""What layouts must recompute at the least to fit, before all of them is settled."""

import msgspec

from meshwright.plan.bound import mean_local
from meshwright.plan.fit import least_recompute, room_bytes, with_layout
from meshwright.plan.held import state_bytes
from meshwright.plan.shared import Shared
from meshwright.plan.space import Space
from meshwright.spec import Job, Layout, Recompute


class Demand:
    """What layouts must recompute, by how the model is divided and runs and what is held whole; each worked out once.

    Of each size of expert the ways to share data that need the least memory are looked at, with as much as can be on
    the host: whatever else is settled later, a layout recomputes as much or more.
    """

    def __init__(self, job: Job, space: Space, shared: Shared) -> None:
        self._job = job
        self._space = space
        self._shared = shared
        self._known: dict[Layout, dict[int, list[Recompute | int]]] = {}

    def choices(self, layout: Layout) -> dict[int, list[Recompute | int]]:
        """Sizes of expert, and with each what must be recomputed at the least; nothing where it does not fit."""
        if layout in self._known:
            return self._known[layout]
        offloads = [each for each in self._space.offloads(layout) if each != "parameters" or layout.zero == 3]
        if not offloads:
            return {}
        less = self.smaller(layout)
        known = None if less is None else self.choices(less)
        # Where nothing is divided, no gather needs a buffer.
        ends: dict[int, list[Layout]] = {}
        for split in self._space.sharings(layout):
            if self._space.expert_refusal(split) is None and (known is None or split.expert in known):
                ends.setdefault(split.expert, []).append(split)
        found: dict[int, list[Recompute | int]] = {}
        for expert, splits in ends.items():
            fewest, most = (choose(splits, key=lambda split: split.replica) for choose in (min, max))
            for split in (fewest, most) if fewest is not most else (fewest,):
                job = with_layout(self._job, msgspec.structs.replace(split, offload=offloads[-1]))
                if not self.overfull(job):
                    fixed = self._space.fixed.get("recompute")
                    choices = least_recompute(job, self._shared.end_frame, fixed, known[expert] if known else ())
                    found.setdefault(expert, []).extend(choices)
        self._known[layout] = {expert: choices for expert, choices in found.items() if choices}
        return self._known[layout]

    def smaller(self, layout: Layout) -> Layout | None:
        """A layout that needs no more memory: one that holds less whole, or else with a smaller microbatch."""
        if layout.zero < 3:
            return msgspec.structs.replace(layout, zero=3)
        # A single microbatch needs no room for sums of gradients.
        alone = layout.accumulation(self._job.data.global_batch) == 1
        sizes = [] if alone else [size for size in self._space.microbatches(layout) if size < layout.microbatch]
        return msgspec.structs.replace(layout, microbatch=max(sizes)) if sizes else None

    def overfull(self, job: Job) -> bool:
        """Whether states alone are more than there is room for."""
        if not job.trainer.gathers or job.layout.offload != "none":
            return False
        return state_bytes(job, mean_local(job, self._shared.cut(job)), 0).total() > room_bytes(job)
