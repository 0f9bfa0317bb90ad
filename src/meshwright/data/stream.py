"""Samples as a pure function of (seed, step, index in the global batch). docs/data.md states it in full."""

from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from meshwright.data.folder import TokenFolder
from meshwright.data.prepare import prepare
from meshwright.data.shuffle import mix, permute
from meshwright.spec import DataSettings, Job, SettingError

Tokens = NDArray[Any]
Array = TypeVar("Array")
Other = TypeVar("Other")


class Batch(NamedTuple, Generic[Array]):
    """Some samples, each [count, S]; numpy's arrays where they are read, tensors where they are used.

    targets: the next token of each, or NOT_COUNTED. documents: in which of its sample's documents a token is,
    counted from 0; None where the job's data.attention does not ask.
    """

    tokens: Array
    targets: Array
    documents: Array | None

    def each(self, change: Callable[[Array], Other]) -> "Batch[Other]":
        """The same batch of other arrays."""
        documents = None if self.documents is None else change(self.documents)
        return Batch(change(self.tokens), change(self.targets), documents)


class Split:
    """Some of a corpus's documents, end to end, as if they were one array; held as runs of adjacent documents."""

    def __init__(self, folder: TokenFolder, chosen: NDArray[np.bool_]) -> None:
        # A run starts where `chosen` turns true and ends where it turns false.
        edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
        runs = folder.offsets[edges].reshape(-1, 2)
        self._corpus = folder.tokens
        self._offsets = folder.offsets
        self._starts = runs[:, 0]  # in the corpus
        self._before = np.concatenate(([0], np.cumsum(runs[:, 1] - runs[:, 0])))  # tokens of the split before each run
        self.tokens = int(self._before[-1])

    def read(self, start: int, count: int) -> NDArray[Any]:
        """`count` tokens from the split's token `start` on."""
        return np.concatenate([self._corpus[piece] for piece in self._pieces(start, count)])

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
        self._by_document = settings.attention == "document"
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

    def batch(self, step: int, first_index: int, count: int) -> Batch[Tokens]:
        """Samples `first_index` and on of a step's global batch."""
        indices = range(first_index, first_index + count)
        return self._gather(self._training, [self.sample_offset(step, index) for index in indices])

    def counted(self, step: int) -> int:  # noqa: ARG002
        """How many targets of a step's whole global batch are counted."""
        return self.global_batch * self.sequence

    def held_out_batch(self, index: int, count: int) -> Batch[Tokens]:
        """Held-out samples `index` and on, in the corpus's order."""
        if not 0 <= index <= index + count <= self.held_out_samples:
            raise IndexError(f"held-out samples {index} to {index + count - 1} of {self.held_out_samples}")
        return self._gather(self._held_out, [number * self.sequence for number in range(index, index + count)])

    def _gather(self, split: Split, offsets: list[int]) -> Batch[Tokens]:
        samples = np.stack([split.read(offset, self.sequence + 1) for offset in offsets]).astype(np.int64)
        # Only a folder made elsewhere can break this; on a GPU it would end in an assertion without a place.
        if samples.max() >= self._vocabulary:
            reason = f"holds token {samples.max()} and manifest.json says its vocabulary is {self._vocabulary}"
            raise SettingError(f"token folder {self._path}", reason)
        documents = [split.documents(offset, self.sequence) for offset in offsets] if self._by_document else None
        return Batch(
            np.ascontiguousarray(samples[:, :-1]),
            np.ascontiguousarray(samples[:, 1:]),
            np.stack(documents) if documents else None,
        )


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
