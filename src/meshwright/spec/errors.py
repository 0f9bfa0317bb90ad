"""The one error a person sees: a setting, the reason, and the nearest thing that works."""

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches
from typing import Any, cast

import tomli_w

# What may be set instead of a refused setting: values by their keys, {"layout.microbatch": 4}.
Offer = dict[str, Any]

# Characters of a refused value that an error shows.
SHOWN = 60
# Choices that a line names before it gets too long.
SHOWN_CHOICES = 8
# Words are alike from this share of common letters on; the second nearest may be meant too if it is about as like.
ALIKE = 0.6
AMBIGUOUS = 0.1


class SettingError(Exception):
    """A setting that cannot be honoured.

    Printed as one line, without a traceback, and the process exits with code 2.
    `setting` is written as the user would type it ("layout.shard = 3"), `nearest` as something to type instead.
    `offers`, in place of `nearest`: several ways out, of each what might do, the nearest first. Whoever knows the whole
    job leaves what does (spec/offers.py); untried, the first of each is named.
    """

    def __init__(self, setting: str, reason: str, nearest: str = "", *, offers: Sequence[Sequence[Offer]] = ()) -> None:
        self.setting = setting
        self.reason = reason
        self.nearest = nearest or offers_text([way[0] for way in offers if way])
        self.offers = offers
        super().__init__(setting, reason, nearest)

    def __str__(self) -> str:
        line = f"{self.setting}: {self.reason}"
        if self.nearest:
            line += f"; nearest that works: {self.nearest}"
        # One line, whatever an operating system or a library put into the reason.
        return " ".join(line.split())


def offers_text(offers: Iterable[Offer]) -> str:
    """Offers as one would type them: "layout.microbatch = 4, or layout.pipeline = 2 with layout.zero = 1"."""
    return ", or ".join(" with ".join(f"{key} = {as_toml(value)}" for key, value in one.items()) for one in offers)


def closest(word: str, known: Iterable[str]) -> str:
    """The known word nearest in spelling to `word`; all of them, joined, when none is near.

    A word that one alone begins with was cut short, whatever else is spelt like it.
    """
    known = list(known)
    longer = [choice for choice in known if choice.startswith(word)] if word else []
    near = longer if len(longer) == 1 else get_close_matches(word, known, n=1, cutoff=0.5)
    return near[0] if near else ", ".join(known)


def nearest_choice(setting: str, word: object, known: Iterable[str], besides: str = "") -> str:
    """`setting = "..."` with the known word that was probably meant, or with all where no single one is near.

    besides: what may be given that is none of the words.
    """
    known = list(known)
    likeness = {choice: SequenceMatcher(None, str(word).lower(), choice).ratio() for choice in known}
    best = max(likeness.values())
    least = best - AMBIGUOUS if best < 1 else best
    near = [choice for choice in known if likeness[choice] >= least] if best >= ALIKE else []
    if len(near) == 1:
        return f'{setting} = "{near[0]}"'
    words = [f'"{choice}"' for choice in known[:SHOWN_CHOICES]]
    besides = "another one" if len(known) > SHOWN_CHOICES else besides
    return f"{setting} = {in_words([*words, besides] if besides else words)}"


def in_words(choices: list[str], last: str = "or") -> str:
    """ "a", "a or b", "a, b or c"."""
    return f" {last} ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)


def as_toml(value: Any) -> str:
    """A value as one would type it, shortened where it is long."""
    if isinstance(value, list | tuple):
        text = f"[{', '.join(as_toml(item) for item in cast(Iterable[Any], value))}]"
    else:
        text = " ".join(tomli_w.dumps({"v": value}).split())
        text = "a section" if text.startswith("[v") else text.removeprefix("v = ")
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
