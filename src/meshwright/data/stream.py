"""Samples as a pure function of (seed, step, index in the global batch). docs/data.md states it in full."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from meshwright.data.folder import TokenFolder
from meshwright.data.mixture import most_without_repeating, turn_of, whole_shares
from meshwright.data.prepare import prepare
from meshwright.data.shuffle import permute
from meshwright.data.split import Split, held_out_documents
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


class Place(NamedTuple):
    """Where a sample is: in which source, and from which token of that source's split on."""

    source: int
    offset: int


class SourceSplits:
    """One source's splits, cut into samples."""

    def __init__(self, folder: TokenFolder, settings: DataSettings, setting: str) -> None:
        held_out = held_out_documents(folder.manifest.documents, settings.held_out)
        self.folder = folder
        self.training = Split(folder, ~held_out)
        self.held_out = Split(folder, held_out)
        self.training_samples = (self.training.tokens - 1) // settings.sequence
        self.held_out_samples = max(0, (self.held_out.tokens - 1) // settings.sequence)
        where = f" of {setting}" if settings.sources else ""
        if self.training_samples < 1:
            raise too_short(settings, f"training documents{where}", self.training.tokens, "")
        if settings.held_out > 0 and self.held_out_samples < 1:
            larger = ", or a larger data.held_out"
            raise too_short(settings, f"held-out documents{where}", self.held_out.tokens, larger)


class Stream:
    """The training samples in their order, and the held-out samples. Holds no position: every call says where."""

    def __init__(self, folders: Sequence[TokenFolder], settings: DataSettings, seed: int) -> None:
        named = settings.named_sources()
        pairs = zip(folders, named, strict=True)
        self.sources = [SourceSplits(folder, settings, name) for folder, (name, _) in pairs]
        self.shares = whole_shares([source.weight for _, source in named])
        self.sequence = settings.sequence
        self.global_batch = settings.global_batch
        self.seed = seed
        self.training_samples = sum(source.training_samples for source in self.sources)
        held_out = [source.held_out_samples for source in self.sources]
        self.held_out_samples = most_without_repeating(held_out, self.shares)
        # A mixture's would be neither one's: which token comes first says little of which source it is from.
        self.bigram_entropy = folders[0].manifest.bigram_entropy if len(folders) == 1 else None
        self.checksum = checksum_of(folders, self.shares)
        self._by_document = settings.attention == "document"
        self._masks = any(folder.masked is not None for folder in folders)

    def place(self, step: int, index: int) -> Place:
        """Where sample `index` of `step`'s global batch is, in its source's training split."""
        source, number = turn_of(step * self.global_batch + index, self.shares)
        samples = self.sources[source].training_samples
        epoch, position = divmod(number, samples)
        # The first source's key is a lone source's: one source in a list is the same as one path.
        key = (self.seed, epoch, source) if source else (self.seed, epoch)
        return Place(source, permute(position, samples, key) * self.sequence)

    def batch(self, step: int, first_index: int, count: int) -> Batch[Tokens]:
        """Samples `first_index` and on of a step's global batch."""
        places = [self.place(step, index) for index in range(first_index, first_index + count)]
        return self._gather([(self.sources[place.source].training, place) for place in places])

    def counted(self, step: int) -> int:
        """How many targets of a step's whole global batch are counted. Only masks are read for it, if there are any."""
        everything = self.global_batch * self.sequence
        if not self._masks:
            return everything
        places = [self.place(step, index) for index in range(self.global_batch)]
        masks = (self.sources[place.source].training.masked(place.offset + 1, self.sequence) for place in places)
        return everything - sum(int(np.count_nonzero(mask)) for mask in masks)

    def held_out_batch(self, index: int, count: int) -> Batch[Tokens]:
        """Held-out samples `index` and on: each source's in its corpus's order."""
        if not 0 <= index <= index + count <= self.held_out_samples:
            raise IndexError(f"held-out samples {index} to {index + count - 1} of {self.held_out_samples}")
        turns = [turn_of(number, self.shares) for number in range(index, index + count)]
        places = [Place(source, number * self.sequence) for source, number in turns]
        return self._gather([(self.sources[place.source].held_out, place) for place in places])

    def _gather(self, samples: list[tuple[Split, Place]]) -> Batch[Tokens]:
        rows = [self._read(split, place) for split, place in samples]
        tokens = np.stack(rows)
        # A copy even of one row, which would be contiguous as it is: targets are masked, tokens are not.
        targets = tokens[:, 1:].copy()
        if self._masks:
            # Here, because it loads torch, and processes that only prepare do without.
            from meshwright.models import NOT_COUNTED

            targets[np.stack([split.masked(place.offset + 1, self.sequence) for split, place in samples])] = NOT_COUNTED
        documents = None
        if self._by_document:
            documents = np.stack([split.documents(place.offset, self.sequence) for split, place in samples])
        return Batch(np.ascontiguousarray(tokens[:, :-1]), targets, documents)

    def _read(self, split: Split, place: Place) -> NDArray[np.int64]:
        tokens = split.read(place.offset, self.sequence + 1).astype(np.int64)
        folder = self.sources[place.source].folder
        # Only a folder made elsewhere can break this; on a GPU it would end in an assertion without a place.
        if tokens.max() >= folder.manifest.vocabulary:
            reason = f"holds token {tokens.max()} and manifest.json says its vocabulary is {folder.manifest.vocabulary}"
            raise SettingError(f"token folder {folder.path}", reason)
        return tokens


def checksum_of(folders: Sequence[TokenFolder], shares: Sequence[int]) -> str:
    """What two machines that train together, or a resumed run, compare: of the tokens, masks and shares."""
    if len(folders) == 1 and folders[0].masked is None:
        return folders[0].manifest.checksum
    whole = hashlib.sha256()
    for folder, share in zip(folders, shares, strict=True):
        whole.update(f"{folder.manifest.checksum} {folder.manifest.mask_checksum} {share}\n".encode())
    return whole.hexdigest()


def open_stream(job: Job) -> Stream:
    """Prepare the job's data where needed and open its stream."""
    folders = prepare(job.data)
    check_vocabulary(job, folders)
    return Stream(folders, job.data, job.run.seed)


def check_vocabulary(job: Job, folders: Sequence[TokenFolder]) -> None:
    """Raise SettingError where the data may hold tokens that the model has not, whether or not one of them occurs."""
    needed = max(folder.manifest.vocabulary for folder in folders)
    if job.model.vocabulary < needed:
        reason = f"the data's vocabulary is {needed:,} tokens"
        raise SettingError(f"model.vocabulary = {job.model.vocabulary}", reason, f"model.vocabulary = {needed}")


def too_short(settings: DataSettings, which: str, tokens: int, besides: str) -> SettingError:
    """A source has not a single sample of a split."""
    longest = f"data.sequence = {tokens - 1}" if tokens > 1 else "more text"
    return SettingError(
        f"data.sequence = {settings.sequence}",
        f"a sample needs {settings.sequence + 1} tokens and the {which} have {tokens}",
        longest + besides,
    )
