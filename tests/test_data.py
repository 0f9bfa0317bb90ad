"""Preparation, the split, the stream's purity, the loader, and every bad input with its line."""

import json
import math
import os
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from meshwright.data import END, Batches, Stream, TokenFolder, open_folder, open_stream, prepare
from meshwright.data.read import NO_DOCUMENT
from meshwright.data.shuffle import mix, permute
from meshwright.data.split import held_out_documents
from meshwright.spec import DataSettings, SettingError
from meshwright.spec.cluster import Cluster
from meshwright.spec.decode import read_job
from meshwright.spec.hardware import cluster_of

BUILD = sys.modules["meshwright.data.build"]
QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.toml"


def text_of(document: int) -> str:
    """Text that names its document in every few bytes, so that any sample tells where it came from."""
    return f"<{document}>" * (3 + document % 7)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "inner").mkdir(parents=True)
    for document in range(40):
        (folder / "inner" / f"{document:02}.txt").write_text(text_of(document))
    lines = [json.dumps({"text": text_of(document), "id": document}) for document in range(40, 60)]
    (folder / "z.jsonl").write_text("\n".join(lines) + "\n\n")
    (folder / "ignored.md").write_text("no")
    return folder


def settings_for(corpus: Path, **changes: object) -> DataSettings:
    settings = DataSettings(
        path=str(corpus), sequence=16, global_batch=12, held_out=0.2, cache=str(corpus.parent / "cache")
    )
    return msgspec.structs.replace(settings, **changes)


def stream_of(corpus: Path, seed: int = 0, **changes: object) -> Stream:
    settings = settings_for(corpus, **changes)
    return Stream(prepare(settings), settings, seed)


def prepared(settings: DataSettings) -> TokenFolder:
    (folder,) = prepare(settings)
    return folder


def documents_of(folder: TokenFolder) -> list[str]:
    pairs = list(pairwise(folder.offsets))
    assert all(folder.tokens[end - 1] == END for _, end in pairs)
    return [bytes(folder.tokens[start : end - 1].astype(np.uint8)).decode() for start, end in pairs]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(SettingError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


# What cannot be honoured


def test_missing_folder(tmp_path: Path) -> None:
    line = refusal(lambda: prepared(settings_for(tmp_path / "none")))
    assert line == f'data.path = "{tmp_path}/none": no such file or folder; nearest that works: data.path = "stdlib"'


def test_a_file_of_another_kind(corpus: Path) -> None:
    assert refusal(lambda: prepare(settings_for(corpus / "ignored.md"))) == (
        f'data.path = "{corpus}/ignored.md": is not a file of text or tokens; nearest that works: '
        "data.path = a folder, or a file that ends in .txt, .jsonl, .parquet, .npy or .bin"
    )


def test_no_text_files(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    line = refusal(lambda: prepared(settings_for(tmp_path / "corpus")))
    assert line == (
        f'data.path = "{tmp_path}/corpus": holds no .txt, .jsonl or .parquet file; '
        "nearest that works: a folder of .txt or .jsonl files"
    )


def test_no_text(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").touch()
    line = refusal(lambda: prepared(settings_for(tmp_path / "corpus")))
    assert line == (
        f'data.path = "{tmp_path}/corpus": holds files but no text; '
        "nearest that works: a folder of .txt or .jsonl files"
    )
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "cut', "is not JSON in UTF-8"),
        ("plain text", "is not JSON in UTF-8"),
        ('{"content": "x"}', NO_DOCUMENT),
        ('{"text": 3}', NO_DOCUMENT),
        ('["text"]', NO_DOCUMENT),
    ],
)
def test_bad_line(corpus: Path, line: str, reason: str) -> None:
    (corpus / "bad.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    said = refusal(lambda: prepared(settings_for(corpus)))
    assert said == f'{corpus}/bad.jsonl line 3: {reason}; nearest that works: {{"text": "..."}}'
    assert list((corpus.parent / "cache").iterdir()) == []


def test_unreadable_file(corpus: Path) -> None:
    (corpus / "gone.txt").symlink_to(corpus / "nowhere")
    said = refusal(lambda: prepared(settings_for(corpus)))
    assert said == (
        f"{corpus}/gone.txt: cannot be read (No such file or directory); "
        "nearest that works: a readable file, or a folder without it"
    )


def test_truncated_tokens(corpus: Path) -> None:
    folder = prepared(settings_for(corpus))
    size = folder.manifest.tokens_bytes
    os.truncate(folder.path / "tokens.bin", size - 100)
    for path in (corpus, folder.path):  # from the cache, and given as data.path
        assert refusal(lambda path=path: prepared(settings_for(path))) == (
            f"token folder {folder.path}: tokens.bin has {size - 100} bytes where manifest.json says {size}; "
            "nearest that works: remove the folder and prepare it again"
        )


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("manifest.json", b'{"format": 1', "manifest.json is damaged (Input data was truncated)"),
        ("manifest.json", b"{}", "manifest.json is damaged (Object missing required field `source`)"),
        ("manifest.json", None, "manifest.json cannot be read (No such file or directory)"),
        ("documents.npy", b"\x93NUMPY", "documents.npy is missing or damaged"),
        ("documents.npy", None, "documents.npy is missing or damaged"),
        ("tokens.bin", None, "tokens.bin has 0 bytes where manifest.json says"),
    ],
)
def test_damaged_folder(corpus: Path, file: str, content: bytes | None, reason: str) -> None:
    folder = prepared(settings_for(corpus))
    (folder.path / file).unlink()
    if content is not None:
        (folder.path / file).write_bytes(content)
    said = refusal(lambda: prepared(settings_for(folder.path)))
    assert said.startswith(f"token folder {folder.path}: {reason}")
    assert said.endswith("; nearest that works: remove the folder and prepare it again")


def test_documents_that_do_not_fit(corpus: Path) -> None:
    folder = prepared(settings_for(corpus))
    np.save(folder.path / "documents.npy", folder.offsets[:-1], allow_pickle=False)
    assert "documents.npy does not fit manifest.json" in refusal(lambda: open_folder(folder.path))


def test_nothing_is_unpickled(corpus: Path) -> None:
    folder = prepared(settings_for(corpus))
    np.save(folder.path / "documents.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert "documents.npy is missing or damaged" in refusal(lambda: open_folder(folder.path))


def test_corpus_shorter_than_a_sample(corpus: Path) -> None:
    line = refusal(lambda: stream_of(corpus, sequence=100_000, held_out=0.0))
    tokens = prepared(settings_for(corpus)).manifest.tokens
    assert line == (
        f"data.sequence = 100000: a sample needs 100001 tokens and the training documents have {tokens}; "
        f"nearest that works: data.sequence = {tokens - 1}"
    )
    assert stream_of(corpus, sequence=tokens - 1, held_out=0.0).training_samples == 1


def test_held_out_part_shorter_than_a_sample(corpus: Path) -> None:
    line = refusal(lambda: stream_of(corpus, sequence=600, held_out=0.001))
    assert line.startswith("data.sequence = 600: a sample needs 601 tokens and the held-out documents have ")
    assert line.endswith(", or a larger data.held_out")


def test_nothing_left_to_train_on() -> None:
    line = refusal(lambda: held_out_documents(2, 1.0))
    assert line == (
        "data.held_out = 1.0: all 2 documents would be held out and none left to train on; "
        "nearest that works: data.held_out = 0.5, or more documents"
    )


def test_one_document_cannot_be_held_out(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("one document " * 20)
    line = refusal(lambda: stream_of(tmp_path / "corpus"))
    assert line == (
        "data.held_out = 0.2: the corpus is one document, and documents are not divided; "
        "nearest that works: data.held_out = 0"
    )
    assert stream_of(tmp_path / "corpus", held_out=0.0).training_samples > 1


def test_full_disk(corpus: Path) -> None:
    """A limit on file sizes stands in for a disk with 4 kB left: the same call fails, with EFBIG for ENOSPC."""
    (corpus / "long.txt").write_bytes(b"x" * 10_000)
    settings = settings_for(corpus)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        line = refusal(lambda: prepared(settings))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line == (
        f'data.cache = "{settings.cache}": tokens cannot be written there (File too large); '
        "nearest that works: a writable folder with room for twice the text"
    )
    assert list(Path(settings.cache).iterdir()) == []
    assert prepared(settings).manifest.documents == 61


def test_cache_that_cannot_be_made(corpus: Path) -> None:
    line = refusal(lambda: prepared(settings_for(corpus, cache=str(corpus / "z.jsonl" / "cache"))))
    assert "tokens cannot be written there (Not a directory)" in line


def test_model_with_too_small_a_vocabulary(corpus: Path) -> None:
    job = read_job(QUICKSTART, ["model.vocabulary=256", f"data.path={corpus}"], local=one_process)
    job = msgspec.structs.replace(job, data=settings_for(corpus))
    assert refusal(lambda: open_stream(job)) == (
        "model.vocabulary = 256: the data's vocabulary is 257 tokens; nearest that works: model.vocabulary = 257"
    )


def one_process(_: int) -> Cluster:
    return cluster_of("1xh100")


def test_a_token_outside_the_vocabulary(corpus: Path) -> None:
    folder = prepared(settings_for(corpus))
    smaller = msgspec.structs.replace(folder.manifest, vocabulary=100)
    (folder.path / "manifest.json").write_bytes(msgspec.json.encode(smaller))
    line = refusal(lambda: stream_of(corpus).batch(0, 0, 12))
    assert line == f"token folder {folder.path}: holds token 256 and manifest.json says its vocabulary is 100"


def test_a_folder_made_elsewhere(tmp_path: Path) -> None:
    """docs/data.md's format, written by hand: 4-byte tokens of another tokenizer, no entropy."""
    path = tmp_path / "tokens"
    path.mkdir()
    tokens = np.arange(100_000, 100_200, dtype="<u4")
    (path / "tokens.bin").write_bytes(tokens.tobytes())
    np.save(path / "documents.npy", np.array([0, 50, 120, 200], dtype=np.int64))
    manifest = {"source": "mine", "fingerprint": "", "documents": 3, "tokens": 200, "tokens_bytes": 800}
    manifest |= {"dtype": "uint32", "vocabulary": 128256, "checksum": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    stream = stream_of(path, held_out=0.0)
    drawn = stream.batch(0, 0, stream.training_samples)[0]
    assert sorted(drawn.flatten().tolist()) == list(range(100_000, 100_000 + 16 * stream.training_samples))
