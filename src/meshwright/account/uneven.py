"""Waiting that the routing of a mixture explains: a rank whose experts got more tokens computes longer."""

from meshwright.account.step import MeasuredStep


def uneven_seconds(waiting: MeasuredStep, other: MeasuredStep) -> float:
    """Seconds of `other`'s step that it computed because its experts got more rows than `waiting`'s.

    Pass by pass: ranks meet after each, so rows that `waiting` had more of elsewhere do not make up for it. Time is
    reckoned by FLOPs: a row's share of the compute measured. So this is what the layout explains of a wait, at most.
    """
    rows = sum(other.expert_rows)
    if not rows:
        return 0.0
    more = sum(max(0, theirs - ours) for theirs, ours in zip(other.expert_rows, waiting.expert_rows, strict=False))
    return other.account.compute * other.expert_share * more / rows
