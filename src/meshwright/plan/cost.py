"""What a plan costs, where the cluster has a price, and how long a number of tokens takes."""

from collections.abc import Sequence

import msgspec

from meshwright.record import Prediction
from meshwright.spec import Job, Layout

HOUR_S, DAY_S = 3600, 86400
MILLION = 1_000_000


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Of one layout, in the currency of `cluster.price_per_device_hour`, for the devices that the layout uses.

    run, run_s: cost and seconds of all the tokens that are to be trained on; None where nobody said how many.
    """

    layout: Layout
    step: float | None
    million_tokens: float | None
    run: float | None
    run_s: float | None


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Of the job's own layout, of the first in rank and of the cheapest; None of the last two where nothing fits.

    tokens: that are to be trained on. Prices are None where the cluster has none.
    """

    tokens: int | None
    own: Cost
    first: Cost | None
    cheapest: Cost | None


def predict_costs(job: Job, own: Prediction, ranked: Sequence[Prediction], tokens: int | None) -> Costs | None:
    """What the job and the best layouts cost; None where there is neither a price nor a number of tokens to take.

    None also where times are not known, which a price would be a multiple of.
    """
    price = job.cluster.price_per_device_hour
    if not own.step_s or (price is None and tokens is None):
        return None
    cheapest = min(ranked, key=lambda p: p.layout.world_size * p.step_s, default=None)
    return Costs(
        tokens=tokens,
        own=cost_of(own, price, tokens),
        first=cost_of(ranked[0], price, tokens) if ranked else None,
        cheapest=cost_of(cheapest, price, tokens) if cheapest is not None and price is not None else None,
    )


def cost_of(prediction: Prediction, price: float | None, tokens: int | None) -> Cost:
    """One layout's."""
    run_s = None if tokens is None else tokens / prediction.tokens_per_s
    per_s = None if price is None else price * prediction.layout.world_size / HOUR_S
    return Cost(
        layout=prediction.layout,
        step=None if per_s is None else per_s * prediction.step_s,
        million_tokens=None if per_s is None else per_s * MILLION / prediction.tokens_per_s,
        run=None if per_s is None or run_s is None else per_s * run_s,
        run_s=run_s,
    )


def three_figures(value: float) -> str:
    """A number with three figures, or in whole units where it has more."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"
