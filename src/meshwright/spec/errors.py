"""The one error a person sees: a setting, the reason, and the nearest thing that works."""

from collections.abc import Iterable
from difflib import get_close_matches


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
