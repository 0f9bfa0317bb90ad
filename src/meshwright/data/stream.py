"""Samples as a pure function of (seed, step, index in the global batch). docs/data.md states it in full."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.data.folder import TokenFolder
from meshwright.data.prepare import prepare
from meshwright.data.shuffle import mix, permute
from meshwright.spec import DataSettings, Job, SettingError

Tokens = NDArray[np.int64]


class Split:
    """Some of a corpus's documents, end to end, as if they were one array; held as runs of adjacent documents."""

    def __init__(self, folder: TokenFolder, chosen: NDArray[np.bool_]) -> None:
        # A run starts where `chosen` turns true and ends where it turns false.
        edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
        runs = folder.offsets[edges].reshape(-1, 2)
        self._corpus = folder.tokens
        self._starts = runs[:, 0]  # in the corpus
        self._before = np.concatenate(([0], np.cumsum(runs[:, 1] - runs[:, 0])))  # tokens of the split before each run
        self.tokens = int(self._before[-1])

    def read(self, start: int, count: int) -> NDArray[Any]:
        """`count` tokens from the split's token `start` on."""
        pieces: list[NDArray[Any]] = []
        run = int(np.searchsorted(self._before, start, side="right")) - 1
        while count > 0:
            take = min(count, int(self._before[run + 1]) - start)
            place = int(self._starts[run] - self._before[run]) + start
            pieces.append(self._corpus[place : place + take])
            start, count, run = start + take, count - take, run + 1
        return np.concatenate(pieces)


class Stream:
    """The training samples in their order, and the held-out samples. Holds no position: every call says where."""

    def __init__(self, folder: TokenFolder, settings: DataSettings, seed: int) -> None:
        held_out = held_out_documents(folder.manifest.documents, settings.held_out)
        self._training = Split(folder, ~held_out)
        self._held_out = Split(folder, held_out)
        self._path = folder.path
        self._vocabulary = folder.manifest.vocabulary
        self.bigram_entropy = folder.manifest.bigram_entropy
        self.checksum = folder.manifest.checksum
        self.sequence = settings.sequence
        self.global_batch = settings.global_batch
        self.seed = seed
        self.training_samples = (self._training.tokens - 1) // self.sequence
        self.held_out_samples = max(0, (self._held_out.tokens - 1) // self.sequence)
        if self.training_samples < 1:
            raise too_short(settings, "training", self._training.tokens)
        if settings.held_out > 0 and self.held_out_samples < 1:
            raise too_short(settings, "held-out", self._held_out.tokens)

    def sample_offset(self, step: int, index: int) -> int:
        """Where in the training split sample `index` of `step`'s global batch starts."""
        epoch, position = divmod(step * self.global_batch + index, self.training_samples)
        return permute(position, self.training_samples, (self.seed, epoch)) * self.sequence

    def batch(self, step: int, first_index: int, count: int) -> tuple[Tokens, Tokens]:
        """Tokens and targets, each [count, sequence], of samples `first_index` and on of a step's global batch."""
        indices = range(first_index, first_index + count)
        return self._gather(self._training, [self.sample_offset(step, index) for index in indices])

    def held_out_batch(self, index: int, count: int) -> tuple[Tokens, Tokens]:
        """Tokens and targets, each [count, sequence], of held-out samples `index` and on, in the corpus's order."""
        if not 0 <= index <= index + count <= self.held_out_samples:
            raise IndexError(f"held-out samples {index} to {index + count - 1} of {self.held_out_samples}")
        return self._gather(self._held_out, [number * self.sequence for number in range(index, index + count)])

    def _gather(self, split: Split, offsets: list[int]) -> tuple[Tokens, Tokens]:
        samples = np.stack([split.read(offset, self.sequence + 1) for offset in offsets]).astype(np.int64)
        # Only a folder made elsewhere can break this; on a GPU it would end in an assertion without a place.
        if samples.max() >= self._vocabulary:
            reason = f"holds token {samples.max()} and manifest.json says its vocabulary is {self._vocabulary}"
            raise SettingError(f"token folder {self._path}", reason)
        return np.ascontiguousarray(samples[:, :-1]), np.ascontiguousarray(samples[:, 1:])


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


def open_stream(job: Job) -> Stream:
    """Prepare the job's data where needed and open its stream."""
    folder = prepare(job.data)
    if job.model.vocabulary < folder.manifest.vocabulary:
        raise SettingError(
            f"model.vocabulary = {job.model.vocabulary}",
            f"the data has {folder.manifest.vocabulary} different tokens",
            f"model.vocabulary = {folder.manifest.vocabulary}",
        )
    return Stream(folder, job.data, job.run.seed)


def too_short(settings: DataSettings, which: str, tokens: int) -> SettingError:
    """One of the splits has not a single sample."""
    longest = f"data.sequence = {tokens - 1}" if tokens > 1 else "more text"
    return SettingError(
        f"data.sequence = {settings.sequence}",
        f"a sample needs {settings.sequence + 1} tokens and the {which} documents have {tokens}",
        longest if which == "training" else f"{longest}, or a larger data.held_out",
    )
