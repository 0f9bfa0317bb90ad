"""Files of tokens that somebody else made, read in place."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from commands import run
from corpora import refusal
from test_tokenizing import write_job
from tokenized import plain_ids, settings_for, write_tokenizer

from meshwright.data import Stream, prepare
from meshwright.spec import DataSettings


def in_place(folder: Path, kind: str, **changes: Any) -> DataSettings:
    tokens = np.random.default_rng(0).integers(0, 500, 4000)
    tokens[99::100] = 500
    file = folder / f"tokens{'.bin' if kind.startswith('bin') else '.npy'}"
    if kind.startswith("bin"):
        tokens.astype({"bin2": "<u2", "bin4": "<u4"}[kind]).tofile(file)
        changes |= {"dtype": "uint32"} if kind == "bin4" else {}
    else:
        np.save(file, tokens.astype(kind))
    settings = DataSettings(path=str(file), sequence=16, global_batch=4, cache=str(folder / "cache"))
    return msgspec.structs.replace(settings, **changes)


@pytest.mark.parametrize("kind", ["bin2", "bin4", "uint16", "uint32", "int32", "int64"])
def test_tokens_are_read_where_they_are(tmp_path: Path, kind: str) -> None:
    settings = in_place(tmp_path, kind, end_token="500")
    (folder,) = prepare(settings)
    assert folder.manifest.documents == 40 and folder.manifest.vocabulary == 501
    assert folder.offsets.tolist() == list(range(0, 4001, 100))
    assert not (folder.path / "tokens.bin").exists()
    assert isinstance(folder.tokens, np.memmap) and folder.tokens.filename == Path(settings.path)
    whole = np.load(settings.path) if settings.path.endswith("npy") else np.fromfile(settings.path, settings.dtype)
    assert folder.tokens.tolist() == whole.tolist()
    stream = Stream([folder], settings, 0)
    assert stream.held_out_samples > 0 and stream.batch(0, 0, 4).tokens.dtype == np.int64
    (again,) = prepare(settings)
    assert again.manifest == folder.manifest


def test_without_an_end_token_a_file_is_one_document(tmp_path: Path) -> None:
    settings = in_place(tmp_path, "bin2", held_out=0.0)
    (folder,) = prepare(settings)
    assert folder.offsets.tolist() == [0, 4000]
    assert Stream([folder], settings, 0).training_samples == 3999 // 16
    held_out = msgspec.structs.replace(settings, held_out=0.1)
    assert "the corpus is one document" in refusal(lambda: Stream(prepare(held_out), held_out, 0))


def test_the_tokenizer_knows_the_end_token(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    ids = np.array([*plain_ids("one"), 0, *plain_ids("the other"), 0], dtype=np.uint16)
    np.save(tmp_path / "a.npy", ids)
    (folder,) = prepare(settings_for(tmp_path, path=str(tmp_path / "a.npy")))
    assert folder.manifest.documents == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.zeros((2, 3), np.uint16), "holds <u2 in shape (2, 3)"),
        (np.zeros(3, np.float32), "holds <f4 in shape (3,)"),
        (np.zeros(0, np.uint16), "holds no tokens"),
        (np.zeros(3, ">u2"), "holds >u2 in shape (3,)"),
        (np.array([1, -1], np.int32), "holds a number below 0"),
        (np.array([{}], dtype=object), "is not an array of numbers"),
    ],
)
def test_files_that_hold_no_tokens(tmp_path: Path, content: np.ndarray, reason: str) -> None:
    np.save(tmp_path / "a.npy", content, allow_pickle=True)
    settings = DataSettings(path=str(tmp_path / "a.npy"), sequence=16, global_batch=4, cache=str(tmp_path / "cache"))
    assert reason in refusal(lambda: prepare(settings))


@pytest.mark.parametrize("name", ["a.bin", "a.npy"])
@pytest.mark.parametrize("content", [b"", b"abc"])
def test_files_that_are_cut(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    settings = DataSettings(path=str(tmp_path / name), sequence=16, global_batch=4, cache=str(tmp_path / "cache"))
    assert "is not an array of numbers" in refusal(lambda: prepare(settings))


def test_tokens_of_an_unknown_tokenizer_are_not_shown_as_bytes(tmp_path: Path) -> None:
    settings = in_place(tmp_path, "bin2", end_token="500")
    job = write_job(tmp_path, path=settings.path, tokenizer="bytes", end_token="500")
    shown = run("data", "show", job)
    assert shown.returncode == 2 and shown.stdout == ""
    assert shown.stderr == (
        f'error: data.path = "{settings.path}": its tokens are not bytes; '
        "nearest that works: data.tokenizer = the one that made them\n"
    )
    write_tokenizer(tmp_path / "tokenizer")
    with_tokenizer = ("--set", f"data.tokenizer={tmp_path / 'tokenizer'}", "--set", "data.end_token=")
    assert run("data", "show", job, *with_tokenizer).returncode == 0
