"""The one error a person sees: a setting, the reason, and the nearest thing that works."""

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches
from typing import Any, cast

import tomli_w

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
    """

    def __init__(self, setting: str, reason: str, nearest: str = "") -> None:
        self.setting = setting
        self.reason = reason
        self.nearest = nearest
        super().__init__(setting, reason, nearest)

    def __str__(self) -> str:
        line = f"{self.setting}: {self.reason}"
        if self.nearest:
            line += f"; nearest that works: {self.nearest}"
        # One line, whatever an operating system or a library put into the reason.
        return " ".join(line.split())


def closest(word: str, known: Iterable[str]) -> str:
    """The known word nearest in spelling to `word`; all of them, joined, when none is near."""
    known = list(known)
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return near[0] if near else ", ".join(known)


def nearest_choice(setting: str, word: object, known: Iterable[str], besides: str = "") -> str:
    """`setting = "..."` with the known word that was probably meant, or with all where no single one is near.

    besides: what may be given that is none of the words.
    """
    known = list(known)
    likeness = {choice: SequenceMatcher(None, str(word), choice).ratio() for choice in known}
    best = max(likeness.values())
    near = [choice for choice in known if likeness[choice] > best - AMBIGUOUS] if best >= ALIKE else []
    if len(near) == 1:
        return f'{setting} = "{near[0]}"'
    words = [f'"{choice}"' for choice in known[:SHOWN_CHOICES]]
    besides = "another one" if len(known) > SHOWN_CHOICES else besides
    return f"{setting} = {in_words([*words, besides] if besides else words)}"


def in_words(choices: list[str]) -> str:
    """ "a", "a or b", "a, b or c"."""
    return " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)


def as_toml(value: Any) -> str:
    """A value as one would type it, shortened where it is long."""
    if isinstance(value, list):
        text = f"[{', '.join(as_toml(item) for item in cast(list[Any], value))}]"
    else:
        text = " ".join(tomli_w.dumps({"v": value}).split())
        text = "a section" if text.startswith("[v") else text.removeprefix("v = ")
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
