"""What a job's axes, schedule and split settle: each pipeline rank's part of the model, and the order of passes."""

import msgspec

from meshwright.plan.activations import Seen
from meshwright.plan.part import Cut, Part, build_parts, cut_model
from meshwright.plan.replay import Timetable, build_timetable
from meshwright.plan.work import Pieces
from meshwright.spec import Job


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """parts: of each rank along pipeline. pieces, seen, apart: where candidates of a search share them; what is seen
    for the first time is added. apart: places of the parts that could be the fullest."""

    cut: Cut
    parts: tuple[Part, ...]
    timetable: Timetable
    pieces: Pieces | None = None
    seen: Seen | None = None
    apart: tuple[int, ...] = ()


def build_frame(job: Job) -> Frame:
    """The frame of a checked job."""
    cut = cut_model(job)
    return Frame(
        cut=cut,
        parts=build_parts(job, cut=cut),
        timetable=build_timetable(job.layout, job.layout.accumulation(job.data.global_batch)),
    )
