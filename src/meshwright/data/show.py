"""Prepared data in words: one sample as text, and what a corpus holds."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import msgspec
import numpy as np

from meshwright.data.build import COUNT_TOKENS, LARGEST_BIGRAM_VOCABULARY
from meshwright.data.folder import TokenFolder
from meshwright.data.mixture import count_before
from meshwright.data.prepare import prepare
from meshwright.data.stream import SourceSplits, Stream, check_vocabulary
from meshwright.data.tokenizer import Tokenizer, open_reader
from meshwright.spec import Job, SettingError

# Around what is read but not learned.
MASKED = ("⟦", "⟧")
PERCENTILES = (0, 10, 50, 90, 99, 100)


def sample_lines(job: Job, step: int, index: int) -> Iterator[str]:
    """Sample `index` of a step's global batch as text: each document under a line of its own, masked text in marks."""
    # Documents are shown whatever attention is told of them.
    settings = msgspec.structs.replace(job.data, attention="document")
    if step < 0:
        raise SettingError(f"--step {step}", "must be at least 0", "--step 0")
    if not 0 <= index < settings.global_batch:
        reason = f"data.global_batch is {settings.global_batch}"
        raise SettingError(f"--index {index}", reason, f"--index {min(max(index, 0), settings.global_batch - 1)}")
    tokenizer = open_reader(settings)
    stream = Stream(prepare(settings), settings, job.run.seed)
    place, batch = stream.place(step, index), stream.batch(step, index, 1)
    assert batch.documents is not None
    source = stream.sources[place.source]
    masked = source.training.masked(place.offset, settings.sequence)
    yield f"step {step}, sample {index} of {settings.global_batch}: {settings.sequence} tokens"
    yield (
        f"from {settings.named_sources()[place.source][1].path}, sample {place.offset // settings.sequence} "
        f"of {source.training_samples}"
    )
    if masked.any():
        yield f"{int(masked.sum())} tokens are not learned, and stand in {MASKED[0]} {MASKED[1]}"
    documents = batch.documents[0]
    for number in range(int(documents[-1]) + 1):
        chosen = documents == number
        yield f"--- document {number}: {int(chosen.sum())} tokens"
        yield marked_text(batch.tokens[0][chosen].tolist(), masked[chosen].tolist(), tokenizer)


def marked_text(tokens: Sequence[int], masked: Sequence[bool], tokenizer: Tokenizer) -> str:
    """The text of tokens, what is masked between marks."""
    parts: list[str] = []
    for hidden, run in groupby(zip(masked, tokens, strict=True), key=lambda pair: pair[0]):
        text = tokenizer.decode([token for _, token in run])
        parts.append(f"{MASKED[0]}{text}{MASKED[1]}" if hidden else text)
    return "".join(parts)


def prepared_lines(job: Job, workers: int | None) -> Iterator[str]:
    """Prepare the job's data, and say of each source where it is."""
    folders = prepare(job.data, workers)
    for (_, source), folder in zip(job.data.named_sources(), folders, strict=True):
        manifest = folder.manifest
        yield f"{source.path}: {manifest.documents:,} documents, {manifest.tokens:,} tokens in {folder.path}"


def stats_lines(job: Job) -> Iterator[str]:
    """What each source of the job holds, and how much of it the run uses."""
    folders = prepare(job.data)
    stream = Stream(folders, job.data, job.run.seed)
    samples = job.run.steps * job.data.global_batch
    taken = count_before(samples, stream.shares)
    for number, (_, source) in enumerate(job.data.named_sources()):
        splits = stream.sources[number]
        yield source.path
        if len(folders) > 1:
            yield f"  share of the samples      {stream.shares[number] / sum(stream.shares):.2%}"
        yield from folder_lines(splits.folder)
        yield from split_lines(splits, job, taken[number])
    if len(folders) > 1:
        tokens = sum(folder.manifest.tokens for folder in folders)
        yield "all sources"
        yield f"  documents                 {sum(folder.manifest.documents for folder in folders):,}"
        yield f"  tokens                    {tokens:,}"
        yield f"  held-out samples          {stream.held_out_samples:,}, in the same shares"
    # Last: whoever asks may be looking for the number.
    check_vocabulary(job, folders)


def folder_lines(folder: TokenFolder) -> Iterator[str]:
    """A corpus as it was tokenised."""
    manifest = folder.manifest
    lengths = np.diff(folder.offsets)
    used = np.zeros(manifest.vocabulary, dtype=np.bool_)
    for start in range(0, manifest.tokens, COUNT_TOKENS):
        used[folder.tokens[start : start + COUNT_TOKENS]] = True
    yield f"  documents                 {manifest.documents:,}"
    yield f"  tokens                    {manifest.tokens:,} ({manifest.dtype})"
    yield f"  vocabulary used           {int(used.sum()):,} of {manifest.vocabulary:,}"
    values = np.percentile(lengths, PERCENTILES, method="nearest")
    shown = ", ".join(f"{value:,} ({percent}%)" for percent, value in zip(PERCENTILES, values, strict=True))
    yield f"  tokens in a document      {shown}"
    yield f"  masked tokens             {manifest.masked / manifest.tokens:.1%}"
    if manifest.bigram_entropy is not None:
        yield f"  bigram entropy            {manifest.bigram_entropy:.3f} nats per token"
    elif manifest.vocabulary > LARGEST_BIGRAM_VOCABULARY:
        yield f"  bigram entropy            not counted above a vocabulary of {LARGEST_BIGRAM_VOCABULARY:,}"
    else:
        yield "  bigram entropy            not counted"


def split_lines(splits: SourceSplits, job: Job, samples: int) -> Iterator[str]:
    """How a corpus is divided and how often the run sees it."""
    epochs = samples / splits.training_samples
    yield f"  training tokens           {splits.training.tokens:,}: {splits.training_samples:,} samples"
    yield f"  epochs in {job.run.steps:,} steps".ljust(28) + f"{epochs:.2f} ({samples:,} samples)"
    yield f"  held-out tokens           {splits.held_out.tokens:,}: {splits.held_out_samples:,} samples"
