"""Which of several offers of machines to take: benefit, cost, what can newly go wrong, and what would change it."""

from collections.abc import Sequence

import msgspec

from meshwright.plan.cost import DAY_S, HOUR_S, MILLION, three_figures
from meshwright.plan.interruptions import Interruptions, predict_interruptions
from meshwright.plan.plan import Plan
from meshwright.plan.verdict import hours_text, spread
from meshwright.record import Prediction
from meshwright.spec import Job

# Offers nearer than this in what decides are as good as each other: the one with fewer devices is taken.
ALIKE = 0.03


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """One cluster with the best layout for it; None where nothing fits, or no time is known.

    global_batch, step_tokens: sequences and tokens of a step, which offers need not share. days, cost: of all the
    tokens, interruptions included, each as (from, expected, to) by the step's interval; None where nobody said how many
    tokens, or what a device costs. million_tokens: cost of as many.
    """

    name: str
    devices: int
    global_batch: int
    step_tokens: int
    best: Prediction | None
    interruptions: Interruptions | None
    tokens_per_s: float
    days: tuple[float, float, float] | None
    cost: tuple[float, float, float] | None
    million_tokens: float | None


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """taken: the offer's name; "" where none can run the job, or none by the deadline. lines: why, in words.

    missed: the names of the offers that can run the job but not by the deadline, the nearest first.
    """

    offers: tuple[Offer, ...]
    taken: str
    lines: tuple[str, ...]
    deadline_hours: float | None = None
    missed: tuple[str, ...] = ()


def make_offer(name: str, job: Job, plan: Plan, tokens: int | None) -> Offer:
    """What a cluster comes to for a job: by the first of its ranked layouts that meets the plan's deadline, if any."""
    batch, sequence = job.data.global_batch, job.data.sequence
    best = chosen(job, plan, tokens)
    if best is None:
        return Offer(
            name=name,
            devices=job.cluster.devices,
            global_batch=batch,
            step_tokens=batch * sequence,
            best=None,
            interruptions=None,
            tokens_per_s=0.0,
            days=None,
            cost=None,
            million_tokens=None,
        )
    interruptions = predict_interruptions(job, best)
    kept, price = best.tokens_per_s * interruptions.productive, job.cluster.price_per_device_hour
    per_s = None if price is None else price * best.layout.world_size / HOUR_S
    days = None if tokens is None or not kept else tokens / kept / DAY_S
    return Offer(
        name=name,
        devices=best.layout.world_size,
        global_batch=batch,
        step_tokens=batch * sequence,
        best=best,
        interruptions=interruptions,
        tokens_per_s=kept,
        days=None if days is None else widened(days, spread(best)),
        cost=None if days is None or per_s is None else widened(days * DAY_S * per_s, spread(best)),
        million_tokens=None if per_s is None or not kept else per_s * MILLION / kept,
    )


def chosen(job: Job, plan: Plan, tokens: int | None) -> Prediction | None:
    """The first in rank that meets the deadline with interruptions, which the plan does not count; else the first."""
    if not plan.ranked or not plan.ranked[0].step_s:
        return None
    limit_hours = plan.goal.deadline_hours
    if tokens is None or limit_hours is None:
        return plan.ranked[0]
    needed_per_s = tokens / (limit_hours * HOUR_S)
    kept = [one.tokens_per_s * predict_interruptions(job, one).productive for one in plan.ranked]
    return next((one for one, per_s in zip(plan.ranked, kept, strict=True) if per_s >= needed_per_s), plan.ranked[0])


def widened(value: float, by: tuple[float, float, float]) -> tuple[float, float, float]:
    """A value with its interval."""
    return value * by[0], value, value * by[2]


def decide(offers: Sequence[Offer], deadline_hours: float | None = None) -> Decision:
    """Of those that meet the deadline the cheapest where all have prices, or else the fastest.

    Of those alike, the one of fewest devices. A deadline is compared with offers whose days are known.
    """
    able = [offer for offer in offers if offer.best is not None and offer.tokens_per_s]
    unable = [f"{offer.name}: nothing fits, or its speed is not known." for offer in offers if offer not in able]
    in_time = [offer for offer in able if deadline_hours is None or hours_of(offer)[1] <= deadline_hours]
    missed = sorted((offer for offer in able if offer not in in_time), key=lambda offer: hours_of(offer)[1])
    late = [miss_text(offer, deadline_hours) for offer in missed if deadline_hours is not None]
    names = tuple(offer.name for offer in missed)
    if not in_time:
        none = "None of the offers can run this job."
        if deadline_hours is not None and missed:
            least = amount(hours_of(missed[0])[1] - deadline_hours)
            none = f"Take none of them: the nearest misses the deadline of {hours_text(deadline_hours)} by {least}."
        lines = (none, *late, *batch_lines(able), *unable)
        return Decision(offers=tuple(offers), taken="", lines=lines, deadline_hours=deadline_hours, missed=names)
    priced = all(offer.million_tokens is not None for offer in in_time)
    ranked = sorted(in_time, key=lambda offer: weight(offer, priced=priced))
    close = [o for o in ranked if weight(o, priced=priced) <= weight(ranked[0], priced=priced) * (1 + ALIKE)]
    taken = min(close, key=lambda offer: offer.devices)
    others = [offer for offer in ranked if offer is not taken]
    lines = [benefit(taken, others, priced=priced, alone=bool(missed) and not others)]
    lines += [spare_text(taken, deadline_hours)] if deadline_hours is not None else []
    lines += [*late, *price_lines(in_time), *batch_lines(able), risk(taken)]
    lines += [what_would_change(taken, others, priced=priced)] if others else []
    lines += note_lines(taken, [offer for offer in able if offer is not taken])
    return Decision(
        offers=tuple(offers),
        taken=taken.name,
        lines=(*lines, *unable),
        deadline_hours=deadline_hours,
        missed=names,
    )


def weight(offer: Offer, *, priced: bool) -> float:
    """What decides, the less the better."""
    return offer.million_tokens or 0.0 if priced else 1 / offer.tokens_per_s


def hours_of(offer: Offer) -> tuple[float, float, float]:
    """Hours of all the tokens, interruptions included, with their interval."""
    assert offer.days is not None
    low, middle, high = (days * DAY_S / HOUR_S for days in offer.days)
    return low, middle, high


def benefit(taken: Offer, others: Sequence[Offer], *, priced: bool, alone: bool) -> str:
    """What the taken offer is better by. alone: the others that can run the job miss the deadline."""
    what = "costs least for each token" if priced else "is the fastest"
    if alone:
        what = "alone meets the deadline"
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
        text += f". Against {other.name} it is {times_text(taken.tokens_per_s / other.tokens_per_s)} times as fast"
        if priced and other.million_tokens and taken.million_tokens:
            text += f" at {times_text(taken.million_tokens / other.million_tokens)} times the cost of a token"
    return text + "."


def spare_text(taken: Offer, deadline_hours: float) -> str:
    """By how much the taken offer meets the deadline, and how it may yet miss it."""
    _, middle, high = hours_of(taken)
    text = f"It meets the deadline of {hours_text(deadline_hours)} with {amount(deadline_hours - middle)} to spare"
    if high <= deadline_hours:
        return f"{text}, and at the slow end of its interval with {amount(deadline_hours - high)}."
    return f"{text}; at the slow end of its interval it would miss it by {amount(high - deadline_hours)}."


def miss_text(offer: Offer, deadline_hours: float) -> str:
    """By how much an offer misses the deadline, and what could make it meet it."""
    low, middle, _ = hours_of(offer)
    text = f"{offer.name} takes {amount(middle)}, {amount(middle - deadline_hours)} more than the deadline"
    found = offer.interruptions
    if found is not None and middle * found.productive <= deadline_hours:
        # A plan for a deadline takes the fewest devices that meet it without interruptions.
        return f"{text}, by interruptions alone: planned for a shorter deadline it may take more devices and meet it."
    if low <= deadline_hours:
        return f"{text}; at the fast end of its interval it would meet it."
    return text + "."


def price_lines(offers: Sequence[Offer]) -> list[str]:
    """That speed decides, where some of the offers have prices that are not looked at."""
    without = [offer.name for offer in offers if offer.million_tokens is None]
    if not without or len(without) == len(offers):
        return []
    have = "has" if len(without) == 1 else "have"
    return [f"Speed decides, because not all have a price: {' and '.join(without)} {have} none."]


def batch_lines(offers: Sequence[Offer]) -> list[str]:
    """That a step is not the same in all offers, where it is not."""
    if len({offer.step_tokens for offer in offers}) < 2:
        return []
    least, *_, most = sorted(offers, key=lambda offer: offer.step_tokens)
    text = (
        f"Their steps are not alike: {least.name} trains on {least.step_tokens:,} tokens a step, {most.name} on "
        f"{most.step_tokens:,}. The default batch goes by the devices; --global-batch {most.global_batch} compares all "
        "with the largest."
    )
    return [text]


def note_lines(taken: Offer, others: Sequence[Offer]) -> list[str]:
    """How far to trust the taken offer's prediction, where that does not hold of all the others too."""
    assert taken.best is not None
    held = [other.best.notes for other in others if other.best is not None]
    differing = [note for note in taken.best.notes if not all(note in notes for notes in held)]
    return [f"Of {taken.name}: {note}." for note in differing]


def risk(taken: Offer) -> str:
    """How it can fail, and how often to save."""
    found = taken.interruptions
    assert found is not None
    every = (
        f"{found.interval_s / 60:,.0f} minutes"
        if found.interval_s < 2 * HOUR_S
        else f"{found.interval_s / HOUR_S:,.1f} hours"
    )
    return (
        f"Its {taken.devices:,} devices are interrupted {often_text(found.per_day)}; saving every {every} costs least, "
        f"and {found.productive:.1%} of the time becomes steps that are kept."
    )


def what_would_change(taken: Offer, others: Sequence[Offer], *, priced: bool) -> str:
    """Which measurement could turn the answer."""
    next_ = others[0]
    assert taken.best is not None and next_.best is not None
    ratio = weight(next_, priced=priced) / weight(taken, priced=priced)
    if ratio * spread(next_.best)[0] < spread(taken.best)[2]:
        what = "what a million tokens cost" if priced else "tokens/s"
        ends = f"{range_text(taken, priced=priced)} of {taken.name}, {range_text(next_, priced=priced)} of {next_.name}"
        return (
            f"Their intervals of {what} overlap ({ends}): steps of both, measured, could change this, by "
            f"{abs(ratio - 1):.0%} or more; `meshwright calibrate` on one node of each narrows both."
        )
    slower = f"{times_text(ratio)} times as slow as" if ratio >= 2 else f"{ratio - 1:.0%} slower than"
    return f"It stands unless {taken.name} is {slower} predicted, which is outside of its interval."


def range_text(offer: Offer, *, priced: bool) -> str:
    """The interval of what decides, from and to."""
    assert offer.best is not None
    low, _, high = spread(offer.best)
    if priced:
        million = offer.million_tokens or 0.0
        return f"{three_figures(million * low)} to {three_figures(million * high)}"
    return f"{offer.tokens_per_s / high:,.0f} to {offer.tokens_per_s / low:,.0f}"


def often_text(per_day: float) -> str:
    """How often on average something happens that happens so often a day."""
    if per_day >= 1.25:
        return f"{per_day:,.1f} times a day on average"
    if per_day > 0.75:
        return "about once a day"
    days = 1 / per_day
    return f"every {days:.2g} days on average" if days < 10 else f"every {days:,.0f} days on average"


def times_text(factor: float) -> str:
    """A factor, without decimals where it is large."""
    return f"{factor:,.0f}" if factor >= 10 else f"{factor:.2f}"


def amount(hours: float) -> str:
    """A number of hours with three figures or whole ones."""
    return f"{three_figures(hours)} hours"


def days_text(days: float) -> str:
    """A number of days, with two figures where they are few."""
    return f"{days:,.1f}" if days >= 1 else f"{days:.2g}"
