"""A corpus's documents in two splits, training and held out, each read as if it were one array."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.data.folder import TokenFolder
from meshwright.data.shuffle import mix
from meshwright.spec import SettingError


class Split:
    """Some of a corpus's documents, end to end, as if they were one array; held as runs of adjacent documents."""

    def __init__(self, folder: TokenFolder, chosen: NDArray[np.bool_]) -> None:
        # A run starts where `chosen` turns true and ends where it turns false.
        edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
        runs = folder.offsets[edges].reshape(-1, 2)
        self._corpus = folder.tokens
        self._offsets = folder.offsets
        self._masked = folder.masked
        self._starts = runs[:, 0]  # in the corpus
        self._before = np.concatenate(([0], np.cumsum(runs[:, 1] - runs[:, 0])))  # tokens of the split before each run
        self.tokens = int(self._before[-1])

    def read(self, start: int, count: int) -> NDArray[Any]:
        """`count` tokens from the split's token `start` on."""
        return np.concatenate([self._corpus[piece] for piece in self._pieces(start, count)])

    def masked(self, start: int, count: int) -> NDArray[np.bool_]:
        """Which of these tokens are no targets."""
        if self._masked is None:
            return np.zeros(count, dtype=np.bool_)
        return np.concatenate([self._masked[piece] for piece in self._pieces(start, count)])

    def documents(self, start: int, count: int) -> NDArray[np.int32]:
        """In which document each of these tokens is, counted from 0 where they begin."""
        begins = np.zeros(count, dtype=np.int32)
        done = 0
        for piece in self._pieces(start, count):
            first, last = np.searchsorted(self._offsets, (piece.start, piece.stop), side="left")
            begins[self._offsets[first:last] - piece.start + done] = 1
            done += piece.stop - piece.start
        begins[0] = 0
        return np.cumsum(begins, dtype=np.int32)

    def _pieces(self, start: int, count: int) -> Iterator[slice]:
        """Where in the corpus these tokens are."""
        run = int(np.searchsorted(self._before, start, side="right")) - 1
        while count > 0:
            take = min(count, int(self._before[run + 1]) - start)
            place = int(self._starts[run] - self._before[run]) + start
            yield slice(place, place + take)
            start, count, run = start + take, count - take, run + 1


def held_out_documents(documents: int, share: float) -> NDArray[np.bool_]:
    """Which documents are held out: those whose number hashes below `share`, at least one where `share` > 0.

    The seed has no part in it, so that runs with different seeds can be compared.
    """
    if share <= 0:
        return np.zeros(documents, dtype=np.bool_)
    if documents < 2:
        raise SettingError(
            f"data.held_out = {share}", "the corpus is one document, and documents are not divided", "data.held_out = 0"
        )
    hashes = mix(np.arange(documents, dtype=np.uint64))
    held_out = hashes.astype(np.float64) < share * 2.0**64
    held_out[np.argmin(hashes)] = True
    if held_out.all():
        raise SettingError(
            f"data.held_out = {share}",
            f"all {documents} documents would be held out and none left to train on",
            f"data.held_out = {share / 2:.3g}, or more documents",
        )
    return held_out
