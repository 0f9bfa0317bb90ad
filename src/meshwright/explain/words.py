"""Numbers and names as people read them."""

from collections.abc import Iterable, Sequence

# Characters of a kernel's name that a table shows.
NAME_LENGTH = 36
# How many ranks or steps a sentence names before it counts the rest.
NAMED = 8


def seconds_text(seconds: float) -> str:
    """Seconds with about three figures, in the unit that reads best."""
    size = abs(seconds)
    for least, factor, unit, decimals in (
        (7200.0, 1 / 3600, "h", 1),
        (100.0, 1.0, "s", 0),
        (1.0, 1.0, "s", 2),
        (0.1, 1e3, "ms", 0),
        (1e-3, 1e3, "ms", 1),
    ):
        if size >= least:
            return f"{seconds * factor:,.{decimals}f} {unit}"
    return f"{seconds * 1e6:.0f} us" if size >= 5e-7 else "0 s"


def of_step(seconds: float, total: float) -> str:
    """ "0.123 s of each step (12%)"."""
    share = seconds / total if total > 0 else 0.0
    return f"{seconds_text(seconds)} of each step ({share:.0%})"


def bytes_text(size: float) -> str:
    """Bytes in the decimal unit that reads best, as datasheets count them."""
    for least, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        figures = abs(size) / least
        if figures >= 1:
            decimals = 2 if figures < 10 else 1 if figures < 100 else 0
            return f"{size / least:,.{decimals}f} {unit}"
    return f"{size:.0f} B"


def ranks_text(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 1, 2", "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 5 more"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(str(rank) for rank in ranks[:NAMED])
    return f"ranks {shown}" if len(ranks) <= NAMED else f"ranks {shown} and {len(ranks) - NAMED} more"


def steps_text(steps: Sequence[int]) -> str:
    """ "step 25", "steps 25, 50, 75", "9 steps from 25 to 225"."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    if len(steps) > NAMED:
        return f"{len(steps)} steps from {steps[0]} to {steps[-1]}"
    return f"steps {listed(steps)}"


def listed(things: Iterable[object]) -> str:
    """Comma-separated."""
    return ", ".join(str(thing) for thing in things)


def kernel_text(name: str) -> str:
    """A kernel's name without return type, template and arguments, cut where it is long."""
    bare = name.removeprefix("void ").replace("(anonymous namespace)::", "").removeprefix("at::native::")
    # CUTLASS wraps all its kernels in one, and says in the template's argument which it is.
    whole, _, argument = bare.partition("<")
    bare = argument.partition(">")[0] if whole.startswith("cutlass::") else whole
    bare = bare.partition("(")[0] or name
    return bare if len(bare) <= NAME_LENGTH else f"{bare[: NAME_LENGTH - 3]}..."


def counted(number: int, thing: str) -> str:
    """ "1 step", "3 steps"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
