"""Tokens that somebody else made, in one .npy or .bin file: read where they are, looked through once."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright.data.build import COUNT_TOKENS, bigram_entropy, write_documents, write_manifest
from meshwright.data.folder import Manifest
from meshwright.data.progress import TokenisingProgress
from meshwright.data.tokenizer import BYTES, open_tokenizer
from meshwright.spec import DataSettings, SettingError

KINDS = ("uint16", "uint32", "int32", "int64")


def map_tokens(setting: str, file: Path, dtype: str) -> tuple[NDArray[Any], int]:
    """The file's numbers, mapped, and at which byte they begin. dtype: of a .bin file, which does not say."""
    nearest = "one row of uint16 or uint32, as numpy.save or ndarray.tofile writes it"
    try:
        if file.suffix == ".npy":
            tokens = np.load(file, mmap_mode="r", allow_pickle=False)
        else:
            tokens = np.memmap(file, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
    except OSError as error:
        raise SettingError(f'{setting} = "{file}"', f"cannot be read ({error.strerror})", nearest) from None
    except (ValueError, EOFError) as error:
        raise SettingError(f'{setting} = "{file}"', f"is not an array of numbers ({error})", nearest) from None
    little = tokens.dtype.newbyteorder("<") == tokens.dtype
    if not isinstance(tokens, np.memmap) or tokens.ndim != 1 or tokens.dtype.name not in KINDS or not little:
        raise SettingError(f'{setting} = "{file}"', f"holds {tokens.dtype.str} in shape {tokens.shape}", nearest)
    if not tokens.size:
        raise SettingError(f'{setting} = "{file}"', "holds no tokens", nearest)
    return tokens, tokens.offset


def end_of(settings: DataSettings) -> int | None:
    """The token that ends a document: its number in data.end_token, or the tokenizer's; None: there is none."""
    if settings.end_token.isdecimal():
        return int(settings.end_token)
    if settings.tokenizer != BYTES:
        return open_tokenizer(settings).end
    if settings.end_token:
        reason = "a file of tokens says nothing of their texts"
        raise SettingError(f'data.end_token = "{settings.end_token}"', reason, "its number, or data.tokenizer too")
    return None


def write_index(path: Path, settings: DataSettings, setting: str, file: Path, fingerprint: str) -> None:
    """Fill `path` with what a token folder has beside its tokens. One pass over the file, which stays as it is."""
    tokens, offset = map_tokens(setting, file, settings.dtype)
    end = end_of(settings)
    checksum, largest = hashlib.sha256(), 0
    ends: list[NDArray[np.int64]] = []
    with TokenisingProgress(tokens.nbytes) as progress:
        for start in range(0, tokens.size, COUNT_TOKENS):
            piece = np.ascontiguousarray(tokens[start : start + COUNT_TOKENS])
            if int(piece.min()) < 0:
                raise SettingError(f'{setting} = "{file}"', "holds a number below 0", "token numbers, from 0 on")
            largest = max(largest, int(piece.max()))
            checksum.update(piece.data.cast("B"))
            if end is not None:
                ends.append(np.flatnonzero(piece == end) + (start + 1))
            progress.advance(piece.nbytes)
    if not ends or not ends[-1].size or int(ends[-1][-1]) != tokens.size:
        # What comes after the last end token is a document too.
        ends.append(np.array([tokens.size]))
    offsets = np.concatenate(ends)
    write_documents(path, len(offsets), offsets)
    write_manifest(
        path,
        Manifest(
            source=str(file),
            fingerprint=fingerprint,
            documents=len(offsets),
            tokens=tokens.size,
            tokens_bytes=tokens.nbytes,
            dtype=tokens.dtype.name,  # pyright: ignore[reportArgumentType]
            tokens_file=str(file.resolve()),
            tokens_offset=offset,
            vocabulary=largest + 1,
            checksum=checksum.hexdigest(),
            bigram_entropy=bigram_entropy(tokens, largest + 1),
        ),
    )
