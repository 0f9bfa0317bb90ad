"""What a job's axes, schedule and split settle: each pipeline rank's part of the model, and the order of passes."""

import msgspec

from meshwright.plan.part import Cut, Part, build_parts, cut_model
from meshwright.plan.replay import Timetable, build_timetable
from meshwright.spec import Job


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """parts: of each rank along pipeline."""

    cut: Cut
    parts: tuple[Part, ...]
    timetable: Timetable


def build_frame(job: Job) -> Frame:
    """The frame of a checked job."""
    cut = cut_model(job)
    return Frame(
        cut=cut,
        parts=build_parts(job, cut=cut),
        timetable=build_timetable(job.layout, job.layout.accumulation(job.data.global_batch)),
    )
