"""Preparation, the split, the stream's purity, the loader."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from corpora import documents_of, prepared, settings_for, stream_of, text_of, write_corpus

from meshwright.data import END, Batches, Stream
from meshwright.data.shuffle import mix, permute
from meshwright.data.split import held_out_documents

BUILD = sys.modules["meshwright.data.build"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path)


# Preparation


def test_documents_in_order(corpus: Path) -> None:
    folder = prepared(settings_for(corpus))
    assert documents_of(folder) == [text_of(document) for document in range(60)]
    assert folder.manifest.documents == 60
    assert folder.manifest.tokens_bytes == (folder.path / "tokens.bin").stat().st_size == 2 * folder.manifest.tokens


def test_prepared_once(corpus: Path) -> None:
    first = prepared(settings_for(corpus))
    written = (first.path / "tokens.bin").stat().st_mtime_ns
    assert prepared(settings_for(corpus)).path == first.path
    assert (first.path / "tokens.bin").stat().st_mtime_ns == written
    assert sorted(p.name for p in first.path.iterdir()) == ["documents.npy", "manifest.json", "tokens.bin"]
    assert [p.name for p in first.path.parent.iterdir()] == [first.path.name]


def test_a_prepared_folder_is_taken_as_it_is(corpus: Path, tmp_path: Path) -> None:
    folder = prepared(settings_for(corpus))
    again = prepared(settings_for(corpus, path=str(folder.path), cache=str(tmp_path / "unused")))
    assert again.manifest == folder.manifest
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename"])
def test_a_changed_corpus_is_prepared_anew(corpus: Path, change: str) -> None:
    before = prepared(settings_for(corpus))
    file = corpus / "inner" / "00.txt"
    match change:
        case "edit":
            file.write_text("<X>" * 3)  # as long as it was
            os.utime(file, ns=(1, 1))
        case "add":
            (corpus / "new.txt").write_text("new")
        case "remove":
            file.unlink()
        case _:
            file.rename(corpus / "zz.txt")
    after = prepared(settings_for(corpus))
    assert after.path != before.path
    assert after.manifest.checksum != before.manifest.checksum


def test_text_without_content_is_no_document(corpus: Path) -> None:
    (corpus / "inner" / "empty.txt").write_text("")
    (corpus / "y.jsonl").write_text('{"text": ""}\n')
    assert prepared(settings_for(corpus)).manifest.documents == 60


def test_folders_behind_links_are_read_once(corpus: Path) -> None:
    aside = corpus.parent / "aside"
    aside.mkdir()
    (aside / "linked.txt").write_text("behind a link")
    (aside / "back").symlink_to(corpus)
    for name in ("aside", "once more"):
        (corpus / name).symlink_to(aside)
    folder = prepared(settings_for(corpus))
    assert documents_of(folder) == ["behind a link", *map(text_of, range(60))]


def test_any_bytes_are_text(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    content = bytes(range(256)) * 9000  # longer than one piece
    (tmp_path / "corpus" / "a.txt").write_bytes(content)
    folder = prepared(settings_for(tmp_path / "corpus"))
    assert bytes(folder.tokens[:-1].astype(np.uint8)) == content


def test_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "lib"
    for name in ("b.py", "a/x.py", "site-packages/no.py", "dist-packages/no.py", "a/__pycache__/no.py", "no.txt"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(name)
    (library / "latin.py").write_bytes(b"# caf\xe9")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(library)})
    folder = prepared(settings_for(tmp_path, path="stdlib"))
    assert documents_of(folder) == ["a/x.py", "b.py"]


def test_bigram_entropy_is_the_counted_one(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BUILD, "COUNT_TOKENS", 37)  # borders fall inside
    folder = prepared(settings_for(corpus))
    tokens = folder.tokens.tolist()
    pairs = Counter(pairwise(tokens))
    firsts = Counter(tokens[:-1])
    expected = -sum(n * math.log(n / firsts[first]) for (first, _), n in pairs.items()) / (len(tokens) - 1)
    assert folder.manifest.bigram_entropy == pytest.approx(expected, rel=1e-12)


def test_processes_may_prepare_at_once(corpus: Path) -> None:
    code = (
        "import sys; from meshwright.data.prepare import prepare; from meshwright.spec import DataSettings;"
        f"settings = DataSettings(path={str(corpus)!r}, sequence=16, global_batch=1, cache={str(corpus / 'c')!r});"
        "sys.stdin.read(1); print(prepare(settings)[0].manifest.checksum)"
    )
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    checksums = {process.communicate("x")[0] for process in started}
    assert all(process.returncode == 0 for process in started)
    assert checksums == {prepared(settings_for(corpus)).manifest.checksum + "\n"}
    assert len(list((corpus / "c").iterdir())) == 1


# The split


def test_held_out_documents_are_never_trained_on(corpus: Path) -> None:
    stream = stream_of(corpus)
    held_out = set(np.flatnonzero(held_out_documents(60, 0.2)).tolist())
    assert 0 < len(held_out) < 30
    trained = shown_documents(stream.batch(0, 0, stream.training_samples)[0])
    evaluated = shown_documents(stream.held_out_batch(0, stream.held_out_samples)[0])
    assert trained.isdisjoint(held_out)
    assert evaluated <= held_out
    assert len(trained) > 40


def shown_documents(samples: np.ndarray) -> set[int]:
    """Documents that samples of `text_of` show whole numbers of."""
    texts = [bytes(row[row != END].astype(np.uint8)).decode() for row in samples]
    return {int(number) for text in texts for number in re.findall(r"<(\d+)>", text)}


@pytest.mark.parametrize("documents", [2, 3, 60, 5000])
def test_held_out_share(documents: int) -> None:
    chosen = held_out_documents(documents, 0.1)
    assert chosen.sum() >= 1
    if documents == 5000:
        assert chosen.mean() == pytest.approx(0.1, abs=0.015)
    assert not held_out_documents(documents, 0.0).any()
    more = held_out_documents(documents + 100, 0.1)
    assert (more[:documents] <= chosen).all()  # documents added at the end change no document's side


def test_nothing_held_out(corpus: Path) -> None:
    stream = stream_of(corpus, held_out=0.0)
    assert stream.held_out_samples == 0
    assert stream.training_samples == (prepared(settings_for(corpus)).manifest.tokens - 1) // 16


# The stream


def test_samples_are_consecutive_pieces_of_the_training_documents(corpus: Path) -> None:
    stream = stream_of(corpus)
    held_out = held_out_documents(60, 0.2)
    packed = [[*text_of(d).encode(), END] for d in range(60) if not held_out[d]]
    flat = np.array([token for document in packed for token in document])
    for index in range(stream.training_samples):
        tokens, targets, _ = stream.batch(0, index, 1)
        offset = stream.place(0, index).offset
        assert offset % 16 == 0
        assert tokens[0].tolist() == flat[offset : offset + 16].tolist()
        assert targets[0].tolist() == flat[offset + 1 : offset + 17].tolist()


def test_documents_of_a_sample_are_numbered_where_that_is_asked_for(corpus: Path) -> None:
    assert stream_of(corpus).batch(0, 0, 3).documents is None
    stream = stream_of(corpus, attention="document")
    batches = [stream.batch(0, 0, stream.training_samples), stream.held_out_batch(0, stream.held_out_samples)]
    for tokens, _, documents in batches:
        assert documents is not None and documents.dtype == np.int32 and documents.shape == tokens.shape
        # An end token is its document's last; the next token begins another.
        ended = np.cumsum(tokens == END, axis=1)
        assert documents.tolist() == np.hstack([np.zeros((len(tokens), 1)), ended[:, :-1]]).tolist()
    assert max(int(batch.documents.max()) for batch in batches if batch.documents is not None) > 0


def test_every_rank_knows_how_many_targets_of_the_whole_step_count(corpus: Path) -> None:
    batches = batches_of(stream_of(corpus), 2, 3, 2, 2)
    assert batches.next(0).counted == 12 * 16
    batches.close()


def test_an_epoch_visits_each_sample_once_in_an_order_of_its_own(corpus: Path) -> None:
    stream = stream_of(corpus)
    count = stream.training_samples
    epochs = [[stream.place(0, e * count + i).offset // 16 for i in range(count)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(count))
    assert epochs[0] != epochs[1]
    assert epochs[0] != [stream_of(corpus, seed=1).place(0, i).offset // 16 for i in range(count)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permutation(size: int) -> None:
    for key in ((0, 0), (-7, 3)):
        assert sorted(permute(position, size, key) for position in range(size)) == list(range(size))


def test_permutation_has_no_visible_order() -> None:
    size = 20_000
    order = np.array([permute(position, size, (0, 0)) for position in range(size)])
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.03
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03


def test_permutation_of_a_huge_corpus_is_instant() -> None:
    size = 10**15
    assert len({permute(position, size, (0, 0)) for position in range(1000)}) == 1000


def test_the_order_is_fixed_for_ever() -> None:
    """Runs are resumed by later versions: a change of these numbers is a change of every run's data."""
    assert [permute(position, 1000, (0, 0)) for position in range(6)] == [434, 531, 525, 473, 353, 399]
    assert np.flatnonzero(held_out_documents(100, 0.05)).tolist() == [10, 21, 48, 68, 83]
    assert mix(0) == 0xE220A8397B1DCDAF  # SplitMix64 seeded with 0, as its reference implementation prints it


def test_samples_do_not_depend_on_who_asks_or_when(corpus: Path) -> None:
    whole = [stream_of(corpus).batch(step, 0, 12) for step in range(6)]
    fresh = stream_of(corpus)
    for step in (5, 2, 0, 3):
        for index in (11, 0, 4):
            tokens, targets, _ = fresh.batch(step, index, 1)
            assert np.array_equal(tokens[0], whole[step][0][index])
            assert np.array_equal(targets[0], whole[step][1][index])


def test_samples_are_equal_in_another_process(corpus: Path) -> None:
    settings = settings_for(corpus)
    code = (
        "from meshwright.data import Stream, prepare; from meshwright.spec import DataSettings; import msgspec;"
        f"settings = msgspec.json.decode({msgspec.json.encode(settings)!r}, type=DataSettings);"
        "print(Stream(prepare(settings), settings, 0).batch(9, 0, 12)[0].tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == stream_of(corpus).batch(9, 0, 12)[0].tolist()


@pytest.mark.parametrize(("data_size", "microbatch", "accumulation"), [(1, 12, 1), (1, 3, 4), (3, 2, 2), (12, 1, 1)])
def test_every_layout_divides_the_same_global_batch(
    corpus: Path, data_size: int, microbatch: int, accumulation: int
) -> None:
    stream = stream_of(corpus)
    gathered: list[torch.Tensor] = []
    for rank in range(data_size):
        batches = batches_of(stream, rank, data_size, microbatch, accumulation)
        for tokens, targets, _ in batches.next(4).microbatches:
            assert tokens.shape == targets.shape == (microbatch, 16)
            assert tokens.dtype == torch.int64
            assert tokens.is_contiguous()
            assert targets.is_contiguous()
            gathered.append(tokens)
        batches.close()
    assert torch.cat(gathered).tolist() == stream.batch(4, 0, 12)[0].tolist()


def batches_of(stream: Stream, rank: int, data_size: int, microbatch: int, accumulation: int) -> Batches:
    return Batches(
        stream,
        data_rank=rank,
        data_size=data_size,
        microbatch=microbatch,
        accumulation=accumulation,
        device=torch.device("cpu"),
    )


def test_a_resumed_run_continues_the_stream(corpus: Path) -> None:
    through = batches_of(stream_of(corpus), 0, 1, 12, 1)
    seen = [through.next(step).microbatches[0].tokens for step in range(8)]
    through.close()
    resumed = batches_of(stream_of(corpus), 0, 1, 12, 1)  # through an epoch's end: 12 x 8 samples are more than one
    assert all(torch.equal(resumed.next(step).microbatches[0].tokens, seen[step]) for step in range(4, 8))
    resumed.close()
    assert stream_of(corpus).training_samples < 12 * 8


def test_an_error_in_the_thread_reaches_the_caller(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_of(corpus)
    batches = batches_of(stream, 0, 1, 12, 1)
    batch = stream.batch

    def fail_at_two(step: int, first_index: int, count: int) -> object:
        if step == 2:
            raise OSError("the disk is gone")
        return batch(step, first_index, count)

    monkeypatch.setattr(stream, "batch", fail_at_two)
    batches.next(0)
    batches.next(1)
    with pytest.raises(OSError, match="the disk is gone"):
        batches.next(2)
    batches.close()


def test_the_loader_refuses_sizes_that_do_not_multiply_to_the_batch(corpus: Path) -> None:
    with pytest.raises(ValueError, match="2 x 3 x 1 samples, global batch 12"):
        batches_of(stream_of(corpus), 0, 2, 3, 1)


def test_held_out_samples_end(corpus: Path) -> None:
    stream = stream_of(corpus)
    with pytest.raises(IndexError):
        stream.held_out_batch(stream.held_out_samples, 1)
