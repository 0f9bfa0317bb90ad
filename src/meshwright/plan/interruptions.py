"""How often training on so many devices is interrupted, how often it pays to save, and what is left of the time."""

from math import sqrt

import msgspec

from meshwright.plan.cost import DAY_S, HOUR_S
from meshwright.plan.part import STATE_BYTES
from meshwright.record import Prediction
from meshwright.spec import Job, count_parameters

# Hours of one device between two interruptions: 419 unexpected ones in 54 days of 16,384 H100s (arXiv:2407.21783,
# section 3.3.4), where cluster.device_hours_per_failure does not say.
DEVICE_HOURS_PER_FAILURE = 16_384 * 54 * 24 / 419
# What one device can write to storage while training stands still. Assumed: 8 GB/s a node of 8.
SAVE_BYTES_PER_S = 1e9
# From an interruption until steps run again: noticed, restarted, loaded, compiled. Assumed.
RESTART_S = 600.0
# Parameters and AdamW's two moments, fp32.
SAVED_BYTES = 3 * STATE_BYTES


class Interruptions(msgspec.Struct, frozen=True, kw_only=True):
    """Of one layout, on average.

    per_day: interruptions. save_s: what a save stops training for. interval_s: between saves, where saving and what is
    lost cost least together. productive: share of the time that becomes steps that are kept.
    """

    per_day: float
    save_s: float
    interval_s: float
    productive: float


def predict_interruptions(job: Job, prediction: Prediction) -> Interruptions:
    """For a layout of the job's.

    The interval is Young's and Daly's, sqrt(2 x save x time between interruptions) (doi:10.1145/361147.361115,
    doi:10.1016/j.future.2004.11.016), no shorter than a step. Half of it is lost on average, and the restart.
    """
    ranks = prediction.layout.world_size
    hours = job.cluster.device_hours_per_failure or DEVICE_HOURS_PER_FAILURE
    between_s = hours * HOUR_S / ranks
    save_s = SAVED_BYTES * count_parameters(job.model) / (ranks * SAVE_BYTES_PER_S)
    interval_s = max(sqrt(2 * save_s * between_s), prediction.step_s)
    lost = save_s / interval_s + (interval_s / 2 + RESTART_S) / between_s
    return Interruptions(per_day=DAY_S / between_s, save_s=save_s, interval_s=interval_s, productive=max(0.0, 1 - lost))
