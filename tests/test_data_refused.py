"""Data that cannot be used, each with its one line."""

import json
import os
import resource
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from corpora import prepared, refusal, settings_for, stream_of, write_corpus

from meshwright.data import open_folder, open_stream, prepare
from meshwright.data.read import NO_DOCUMENT
from meshwright.data.split import held_out_documents
from meshwright.spec.cluster import Cluster
from meshwright.spec.decode import read_job
from meshwright.spec.hardware import cluster_of

BUILD = sys.modules["meshwright.data.build"]
QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.toml"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path)


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
        ('{"x": ' + "[" * 100_000, "is nested too deeply to be read"),
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
