"""Which of several offers of machines to take: benefit, cost, what can newly go wrong, and what would change it."""

from collections.abc import Sequence

import msgspec

from meshwright.plan.cost import DAY_S, HOUR_S, MILLION, three_figures
from meshwright.plan.interruptions import Interruptions, predict_interruptions
from meshwright.plan.plan import Plan
from meshwright.record import Prediction
from meshwright.spec import Job

# Offers nearer than this in what decides are as good as each other: the one with fewer devices is taken.
ALIKE = 0.03


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """One cluster with the best layout for it; None where nothing fits, or no time is known.

    days, cost: of all the tokens, interruptions included, each as (from, expected, to) by the step's interval; None
    where nobody said how many tokens, or what a device costs. million_tokens: cost of as many.
    """

    name: str
    devices: int
    best: Prediction | None
    interruptions: Interruptions | None
    tokens_per_s: float
    days: tuple[float, float, float] | None
    cost: tuple[float, float, float] | None
    million_tokens: float | None


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """taken: the offer's name; "" where none can run the job. lines: why, in words."""

    offers: tuple[Offer, ...]
    taken: str
    lines: tuple[str, ...]


def make_offer(name: str, job: Job, plan: Plan, tokens: int | None) -> Offer:
    """What a cluster comes to for a job: by the first of its ranked layouts."""
    best = plan.ranked[0] if plan.ranked and plan.ranked[0].step_s else None
    if best is None:
        return Offer(
            name=name,
            devices=job.cluster.devices,
            best=None,
            interruptions=None,
            tokens_per_s=0.0,
            days=None,
            cost=None,
            million_tokens=None,
        )
    interruptions = predict_interruptions(job, best)
    kept, price = best.tokens_per_s * interruptions.productive, job.cluster.price_per_device_hour
    # Of the step's interval, relative to what is expected.
    spread = (best.step_interval_s[0] / best.step_s, 1.0, best.step_interval_s[1] / best.step_s)
    per_s = None if price is None else price * best.layout.world_size / HOUR_S
    days = None if tokens is None or not kept else tokens / kept / DAY_S
    return Offer(
        name=name,
        devices=best.layout.world_size,
        best=best,
        interruptions=interruptions,
        tokens_per_s=kept,
        days=None if days is None else widened(days, spread),
        cost=None if days is None or per_s is None else widened(days * DAY_S * per_s, spread),
        million_tokens=None if per_s is None or not kept else per_s * MILLION / kept,
    )


def widened(value: float, spread: tuple[float, float, float]) -> tuple[float, float, float]:
    """A value with its interval."""
    return value * spread[0], value, value * spread[2]


def decide(offers: Sequence[Offer]) -> Decision:
    """The cheapest of them where all have prices, or else the fastest; of those alike, the one of fewest devices."""
    able = [offer for offer in offers if offer.best is not None and offer.tokens_per_s]
    unable = [f"{offer.name}: nothing fits, or its speed is not known." for offer in offers if offer not in able]
    if not able:
        return Decision(offers=tuple(offers), taken="", lines=("None of the offers can run this job.", *unable))
    priced = all(offer.million_tokens is not None for offer in able)
    ranked = sorted(able, key=lambda offer: weight(offer, priced=priced))
    close = [o for o in ranked if weight(o, priced=priced) <= weight(ranked[0], priced=priced) * (1 + ALIKE)]
    taken = min(close, key=lambda offer: offer.devices)
    others = [offer for offer in ranked if offer is not taken]
    lines = [benefit(taken, others, priced=priced), risk(taken)]
    lines += [what_would_change(taken, others, priced=priced)] if others else []
    return Decision(offers=tuple(offers), taken=taken.name, lines=(*lines, *unable))


def weight(offer: Offer, *, priced: bool) -> float:
    """What decides, the less the better."""
    return offer.million_tokens or 0.0 if priced else 1 / offer.tokens_per_s


def benefit(taken: Offer, others: Sequence[Offer], *, priced: bool) -> str:
    """What the taken offer is better by."""
    what = "costs least for each token" if priced else "is the fastest"
    if any(weight(other, priced=priced) < weight(taken, priced=priced) for other in others):
        alike = "costs as little for each token" if priced else "is as fast"
        what = f"{alike} as any, within {ALIKE:.0%}, with the fewest devices"
    text = f"Take {taken.name}: it {what}, {taken.tokens_per_s:,.0f} tokens/s with interruptions counted"
    if taken.days:
        text += f", {days_text(taken.days[1])} days ({days_text(taken.days[0])} to {days_text(taken.days[2])}) in all"
    if taken.cost:
        low, middle, high = map(three_figures, taken.cost)
        text += f", for {middle} ({low} to {high})"
    for other in others[:1]:
        faster = taken.tokens_per_s / other.tokens_per_s
        text += f". Against {other.name} it is {faster:.2f} times as fast"
        if priced and other.million_tokens and taken.million_tokens:
            text += f" at {taken.million_tokens / other.million_tokens:.2f} times the cost of a token"
    return text + "."


def risk(taken: Offer) -> str:
    """How it can fail, and how often to save."""
    found = taken.interruptions
    assert found is not None
    often = f"every {1 / found.per_day:,.0f} days" if found.per_day < 1 else f"{found.per_day:,.1f} times a day"
    every = (
        f"{found.interval_s / 60:,.0f} minutes"
        if found.interval_s < 2 * HOUR_S
        else f"{found.interval_s / HOUR_S:,.1f} hours"
    )
    return (
        f"Its {taken.devices:,} devices are interrupted {often} on average; saving every {every} costs least, and "
        f"{found.productive:.1%} of the time becomes steps that are kept."
    )


def what_would_change(taken: Offer, others: Sequence[Offer], *, priced: bool) -> str:
    """Which measurement could turn the answer."""
    next_ = others[0]
    assert taken.best is not None and next_.best is not None
    ratio = weight(next_, priced=priced) / weight(taken, priced=priced)
    low = next_.best.step_interval_s[0] / next_.best.step_s
    high = taken.best.step_interval_s[1] / taken.best.step_s
    if ratio * low < high:
        return (
            f"The intervals of {taken.name} and {next_.name} overlap: steps of both, measured, could change this, by "
            f"{abs(ratio - 1):.0%} or more; `meshwright calibrate` on one node of each narrows both."
        )
    return f"It stands unless {taken.name} is {ratio - 1:.0%} slower than predicted, which is outside of its interval."


def days_text(days: float) -> str:
    """A number of days, with two figures where they are few."""
    return f"{days:,.1f}" if days >= 1 else f"{days:.2g}"
