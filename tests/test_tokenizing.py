"""Tokenising with a tokenizer.json: the library's own tokens, whoever makes them and however often they are stopped."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow
import pytest
import tokenizers
import tomli_w
from commands import environment, running, wait_until
from pyarrow import parquet
from tokenized import END_TEXT, plain_ids, settings_for, trained, words, write_tokenizer
from tokenizers import models, pre_tokenizers

from meshwright.data import TokenFolder, prepare
from meshwright.data.build import FolderBuilder
from meshwright.data.encode import Encoded
from meshwright.data.mixture import count_before, most_without_repeating, turn_of, whole_shares
from meshwright.spec import DataSettings


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with text in every kind of file, and a tokenizer beside it."""
    write_tokenizer(tmp_path / "tokenizer")
    text = tmp_path / "text"
    (text / "b").mkdir(parents=True)
    (text / "a.jsonl").write_text("\n".join(json.dumps({"text": words(n, 200)}) for n in range(20)) + "\n\n")
    for number in range(5):
        (text / "b" / f"{number}.txt").write_text(words(100 + number, 100))
    rows = {"text": [words(200 + n, 50) for n in range(30)], "id": list(range(30))}
    parquet.write_table(pyarrow.table(rows), text / "c.parquet", row_group_size=7)
    return tmp_path


def texts_of(corpus: Path) -> list[str]:
    text = corpus / "text"
    lines = [json.loads(line)["text"] for line in (text / "a.jsonl").read_text().splitlines() if line]
    files = [file.read_text() for file in sorted((text / "b").iterdir())]
    return [*lines, *files, *parquet.read_table(text / "c.parquet")["text"].to_pylist()]


def prepared(settings: DataSettings, workers: int | None = None) -> TokenFolder:
    (folder,) = prepare(settings, workers)
    return folder


def documents_of(folder: TokenFolder) -> list[list[int]]:
    return [folder.tokens[start:end].tolist() for start, end in pairwise(folder.offsets)]


# Tokens


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_documents_have_the_librarys_own_tokens(corpus: Path, workers: int) -> None:
    folder = prepared(settings_for(corpus), workers)
    end = trained().token_to_id(END_TEXT)
    assert documents_of(folder) == [[*plain_ids(text), end] for text in texts_of(corpus)]
    assert folder.manifest.vocabulary == 300
    assert folder.masked is None


def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = words(7, 30_000)
    (corpus / "text" / "b" / "long.txt").write_text(long)
    for module in ("read", "source"):
        monkeypatch.setattr(f"meshwright.data.{module}.PIECE_BYTES", 5000)
    monkeypatch.setattr("meshwright.data.source.CHUNK_BYTES", 20_000)
    folder = prepared(settings_for(corpus), 1)
    assert documents_of(folder)[25][:-1] == plain_ids(long)
    assert folder.manifest.documents == 56


def test_workers_divide_one_long_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(words(1, 1_200_000))  # two chunks
    one, two = (prepared(settings_for(tmp_path, cache=str(tmp_path / str(n))), n) for n in (1, 2))
    assert one.manifest == two.manifest
    assert one.manifest.documents == 1


def test_a_tokenizer_that_sees_more_than_words_gets_whole_texts(tmp_path: Path) -> None:
    """One that puts a mark before every text would put one before every piece."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"▁a": 0, "a": 1, "</s>": 2, "?": 3}, unk_token="?"))
    tokenizer.normalizer = tokenizers.normalizers.Prepend("▁")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a " * 3_000_000)
    folder = prepared(settings_for(tmp_path, tokenizer=str(tmp_path / "tokenizer.json")), 1)
    assert folder.tokens[0] == 0 and folder.tokens[-1] == 2 and set(folder.tokens[1:-1].tolist()) == {1}


def test_more_tokens_than_two_bytes_hold(corpus: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.WordLevel({f"w{n}": n for n in range(70_000)} | {"</s>": 70_000}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(corpus / "large.json"))
    (corpus / "text" / "a.jsonl").write_text('{"text": "w69999 w5"}\n')
    folder = prepared(settings_for(corpus, tokenizer=str(corpus / "large.json")))
    assert folder.tokens[:3].tolist() == [69_999, 5, 70_000] and folder.manifest.dtype == "uint32"
    assert folder.manifest.bigram_entropy is None


def test_another_tokenizer_gives_another_folder(corpus: Path) -> None:
    first = prepared(settings_for(corpus))
    moved = corpus / "moved"
    (corpus / "tokenizer").rename(moved)
    assert prepared(settings_for(corpus, tokenizer=str(moved / "tokenizer.json"))).path == first.path
    write_tokenizer(moved, eos_token="<|im_end|>")
    second = prepared(settings_for(corpus, tokenizer=str(moved)))
    assert second.path != first.path
    assert second.tokens[-1] == trained().token_to_id("<|im_end|>")
    third = prepared(settings_for(corpus, tokenizer=str(moved), end_token="<|im_start|>"))
    assert third.tokens[-1] == trained().token_to_id("<|im_start|>")


def test_no_torch_is_loaded_to_tokenise() -> None:
    code = "import sys, meshwright.data.workers, meshwright.data.show; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "False\n"


# Interruptions


def write_job(corpus: Path, **data: Any) -> Path:
    table = {
        "run": {"name": "tokens", "folder": str(corpus / "runs"), "steps": 4},
        "model": {"layers": 1, "d_model": 16, "heads": 2, "feed_forward": 32, "vocabulary": 300},
        "data": {**msgspec.to_builtins(settings_for(corpus)), "attention": "sample", **data},
        "trace": {"every_steps": 0},
    }
    path = corpus / "job.toml"
    path.write_text(tomli_w.dumps(table))
    return path


@pytest.mark.parametrize(("how", "workers"), [(signal.SIGINT, 2), (signal.SIGINT, 1), (signal.SIGKILL, 2)])
def test_an_interrupted_preparation_goes_on(tmp_path: Path, how: signal.Signals, workers: int) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    # Lines from a few, so that it is quickly written and slowly tokenised.
    lines = "".join(json.dumps({"text": words(n, 3000)}) + "\n" for n in range(20)) * 40
    (tmp_path / "text" / "a.jsonl").write_text(lines)
    journal = tmp_path / "cache"

    def saved() -> bool:
        return any(
            b'"chunks":0' not in line for f in journal.glob(".*/journal*") for line in f.read_bytes().splitlines()
        )

    with running("data", "prepare", write_job(tmp_path), "--workers", workers) as process:
        wait_until(saved, process)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert err.strip().endswith("stopped; the same command goes on from here")
    (partial,) = journal.iterdir()
    done = msgspec.json.decode(next(partial.glob("journal*")).read_bytes().splitlines()[-1])
    assert done["chunks"] > 0
    began = (partial / "tokens.bin").stat()
    folder = prepared(settings_for(tmp_path), 2)
    after = (folder.path / "tokens.bin").stat()
    assert after.st_ino == began.st_ino  # the same file, gone on with
    assert folder.manifest == prepared(settings_for(tmp_path, cache=str(tmp_path / "again")), 3).manifest
    assert sorted(p.name for p in folder.path.iterdir()) == ["documents.npy", "manifest.json", "tokens.bin"]


def chunk(*documents: int, goes_on: bool = False, masked: bool = False) -> Encoded:
    tokens = np.concatenate([np.full(length, length, dtype="<u2") for length in documents])
    mask = np.ones(len(tokens), np.bool_) if masked else None
    return Encoded(tokens=tokens, lengths=np.array(documents), masked=mask, goes_on=goes_on)


def test_what_was_not_made_sure_of_is_cut_off(tmp_path: Path) -> None:
    dtype = np.dtype("<u2")
    with FolderBuilder(tmp_path, dtype) as builder:
        builder.add(chunk(3, 4))
        builder.add(chunk(5, goes_on=True, masked=True))
        builder.save()
        builder.add(chunk(9, 9, 9, masked=True))
    with FolderBuilder(tmp_path, dtype) as builder:
        assert (builder.done.chunks, builder.done.tokens, builder.done.documents) == (2, 12, 2)
        builder.add(chunk(1, 2))
        builder.finish(source="", fingerprint="", vocabulary=10)
    (folder,) = prepare(DataSettings(path=str(tmp_path), sequence=1, global_batch=1))
    assert folder.offsets.tolist() == [0, 3, 7, 13, 15]
    assert folder.tokens.tolist() == [3] * 3 + [4] * 4 + [5] * 5 + [1] + [2] * 2
    assert folder.masked is not None and folder.masked.tolist() == [False] * 7 + [True] * 5 + [False] * 3


@pytest.mark.parametrize("damage", ["flip", "cut", "journal", "gone"])
def test_nothing_damaged_is_gone_on_with(tmp_path: Path, damage: str) -> None:
    dtype = np.dtype("<u2")
    with FolderBuilder(tmp_path, dtype) as builder:
        builder.add(chunk(300))
        builder.save()
    tokens, journal = tmp_path / "tokens.bin", next(tmp_path.glob("journal*"))
    match damage:
        case "flip":
            tokens.write_bytes(b"\xff" + tokens.read_bytes()[1:])
        case "cut":
            os.truncate(tokens, 100)
        case "journal":
            journal.write_bytes(journal.read_bytes()[:-20])
        case _:
            tokens.unlink()
    with FolderBuilder(tmp_path, dtype) as builder:
        assert (builder.done.chunks, builder.done.tokens) == (0, 0)
        assert tokens.stat().st_size == 0


def test_a_worker_that_is_killed_is_named(corpus: Path) -> None:
    code = (
        "import os, signal, sys, msgspec; from meshwright.data.workers import Workers;"
        "from meshwright.spec import DataSettings, SettingError;"
        f"settings = msgspec.json.decode({msgspec.json.encode(settings_for(corpus))!r}, type=DataSettings)\n"
        "with Workers(settings, 300, 2) as pool:\n"
        "    for process in pool._processes: process.kill(); process.wait()\n"
        "    try: list(pool.encode([[]]))\n"
        "    except SettingError as error: print(error)"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert "a process that tokenises ended (killed by SIGKILL)" in finished.stdout, finished.stderr


# Mixtures


@pytest.mark.parametrize("weights", [(1.0,), (1, 1), (3, 1), (0.7, 0.2, 0.1), (1, 1000), (5, 1, 1, 2, 0.01)])
def test_sources_get_their_shares_of_every_stretch(weights: tuple[float, ...]) -> None:
    shares = whole_shares(weights)
    counts = [0] * len(weights)
    for number in range(3000):
        assert count_before(number, shares) == counts
        source, own = turn_of(number, shares)
        assert own == counts[source]
        counts[source] += 1
        expected = [(number + 1) * share / sum(shares) for share in shares]
        assert max(abs(count - want) for count, want in zip(counts, expected, strict=True)) < 2
    assert turn_of(10**15, shares).number <= 10**15


def test_the_turns_are_fixed_for_ever() -> None:
    drawn = [turn_of(number, whole_shares((3, 2, 1))).source for number in range(12)]
    assert drawn == [2, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0]


def test_held_out_samples_of_a_mixture_end_with_the_first_source_that_does() -> None:
    shares = whole_shares((1, 1))
    assert most_without_repeating([5, 100], shares) in (10, 11)
    assert most_without_repeating([7], whole_shares((2,))) == 7
