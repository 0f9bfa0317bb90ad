"""A chunk of text to tokens. The same whichever process does it."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshwright.data.chat import ChatError
from meshwright.data.read import Document, read_chunk
from meshwright.data.source import Chunk
from meshwright.data.tokenizer import Ids, Tokenizer
from meshwright.spec import SettingError

# Text that the tokenizer is given at once: enough for its speed, little enough for its memory, which is a hundred
# times the text's.
BATCH_BYTES = 1 << 18


class Encoded(NamedTuple):
    """A chunk's tokens. lengths: of its documents, end tokens included. masked: true where a token is no target.

    goes_on: whether the last document goes on in the next chunk.
    """

    tokens: Ids
    lengths: NDArray[np.int64]
    masked: NDArray[np.bool_] | None
    goes_on: bool


class Piece(NamedTuple):
    """A document's or a piece's tokens, and which of them are no targets; None where all are."""

    tokens: Ids
    masked: NDArray[np.bool_] | None


def dtype_of(vocabulary: int) -> np.dtype[np.unsignedinteger]:
    """The smallest type on disk that holds every token."""
    return np.dtype("<u2") if vocabulary <= 1 << 16 else np.dtype("<u4")


def encode_chunk(chunk: Chunk, tokenizer: Tokenizer) -> Encoded:
    """Read and tokenise a chunk; each document that has tokens is ended by the end token."""
    pieces: list[Piece] = []
    lengths: list[int] = []
    goes_on = False
    for batch in batches(read_chunk(chunk, tokenizer)):
        for document, piece in zip(batch, encode_documents(batch, tokenizer), strict=True):
            length = (lengths.pop() if goes_on else 0) + len(piece.tokens)
            pieces.append(piece)
            # What began in another chunk had tokens there.
            if document.ends and (length or not document.begins):
                closing = ending(document, piece, tokenizer.end)
                pieces.append(closing)
                length += len(closing.tokens)
            goes_on = not document.ends
            if length or goes_on:
                lengths.append(length)
    dtype = dtype_of(tokenizer.vocabulary)
    return Encoded(
        tokens=np.concatenate([piece.tokens.astype(dtype) for piece in pieces]) if pieces else np.zeros(0, dtype),
        lengths=np.array(lengths, dtype=np.int64),
        masked=join_masks(pieces),
        goes_on=goes_on,
    )


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about BATCH_BYTES."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size()
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_documents(batch: list[Document], tokenizer: Tokenizer) -> list[Piece]:
    """Each document's tokens. The plain texts are given to the tokenizer together, which is where its speed is."""
    texts: list[str | bytes] = []
    for document in batch:
        if document.text is not None:
            texts.append(document.text)
        elif document.pair is not None:
            texts += document.pair
    try:
        encoded = iter(tokenizer.encode(texts))
    except UnicodeDecodeError:
        # Which one it was is asked only now: looking at each before would be looking twice.
        raise not_text(batch) from None
    pieces: list[Piece] = []
    for document in batch:
        if document.text is not None:
            pieces.append(Piece(next(encoded), None))
        elif document.pair is not None:
            prompt, completion = next(encoded), next(encoded)
            masked = np.repeat((True, False), (len(prompt), len(completion)))
            pieces.append(Piece(np.concatenate([prompt, completion]), masked))
        else:
            pieces.append(encode_conversation(document, tokenizer))
    return pieces


def encode_conversation(document: Document, tokenizer: Tokenizer) -> Piece:
    """A conversation through the chat template; what is not the assistant's is masked."""
    if tokenizer.template is None:
        nearest = "data.tokenizer = a folder whose tokenizer_config.json has a chat_template"
        raise SettingError(document.place(), "is a conversation, and the tokenizer has no chat template", nearest)
    try:
        text, spans = tokenizer.template.render_marked(document.messages or [])
    except ChatError as error:
        nearest = "a chat template with {% generation %} around the assistant's words, or lines with a prompt"
        raise SettingError(document.place(), str(error), nearest) from None
    ids, starts = tokenizer.encode_placed([text])[0]
    counted = np.zeros(len(ids), dtype=np.bool_)
    for first, last in spans:
        counted |= (starts >= first) & (starts < last)
    return Piece(ids, ~counted)


def ending(document: Document, piece: Piece, end: int) -> Piece:
    """The end token. A conversation has ends of turns to learn; where it comes with this very token, no second one."""
    if document.messages is None:
        return Piece(np.array([end]), None)
    there = len(piece.tokens) > 0 and piece.tokens[-1] == end
    return Piece(np.zeros(0, np.int64), None) if there else Piece(np.array([end]), np.ones(1, np.bool_))


def join_masks(pieces: list[Piece]) -> NDArray[np.bool_] | None:
    """All pieces' masks, end to end; None where nothing is masked."""
    if all(piece.masked is None for piece in pieces):
        return None
    empty = (np.zeros(len(piece.tokens), np.bool_) if piece.masked is None else piece.masked for piece in pieces)
    return np.concatenate(list(empty))


def not_text(batch: list[Document]) -> SettingError:
    """The first document that is not UTF-8."""
    for document in batch:
        if isinstance(document.text, bytes):
            try:
                document.text.decode()
            except UnicodeDecodeError:
                return SettingError(document.place(), "is not UTF-8", 'data.tokenizer = "bytes", or the text as UTF-8')
    return SettingError("data.path", "holds text that is not UTF-8", 'data.tokenizer = "bytes"')
