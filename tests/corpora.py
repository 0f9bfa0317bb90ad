"""A small corpus as bytes, and what is made of it."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest

from meshwright.data import END, Stream, TokenFolder, prepare
from meshwright.spec import DataSettings, SettingError


def text_of(document: int) -> str:
    """Text that names its document in every few bytes, so that any sample tells where it came from."""
    return f"<{document}>" * (3 + document % 7)


def write_corpus(parent: Path) -> Path:
    """A folder of 60 documents: 40 files below it, and 20 lines of one."""
    folder = parent / "corpus"
    (folder / "inner").mkdir(parents=True)
    for document in range(40):
        (folder / "inner" / f"{document:02}.txt").write_text(text_of(document))
    lines = [json.dumps({"text": text_of(document), "id": document}) for document in range(40, 60)]
    (folder / "z.jsonl").write_text("\n".join(lines) + "\n\n")
    (folder / "ignored.md").write_text("no")
    return folder


def settings_for(corpus: Path, **changes: object) -> DataSettings:
    """The data of a corpus, with its cache beside it."""
    settings = DataSettings(
        path=str(corpus), sequence=16, global_batch=12, held_out=0.2, cache=str(corpus.parent / "cache")
    )
    return msgspec.structs.replace(settings, **changes)


def stream_of(corpus: Path, seed: int = 0, **changes: object) -> Stream:
    """Its samples."""
    settings = settings_for(corpus, **changes)
    return Stream(prepare(settings), settings, seed)


def prepared(settings: DataSettings) -> TokenFolder:
    """The one source's token folder."""
    (folder,) = prepare(settings)
    return folder


def documents_of(folder: TokenFolder) -> list[str]:
    """Every document's text."""
    pairs = list(pairwise(folder.offsets))
    assert all(folder.tokens[end - 1] == END for _, end in pairs)
    return [bytes(folder.tokens[start : end - 1].astype(np.uint8)).decode() for start, end in pairs]


def refusal(call: Callable[[], object]) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(SettingError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)
