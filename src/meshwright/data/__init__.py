"""Text to token folders, and token folders to samples that depend on (seed, step, index) alone."""

from typing import TYPE_CHECKING, Any

from meshwright.data.folder import END, VOCABULARY, Manifest, TokenFolder, is_prepared, open_folder
from meshwright.data.prepare import prepare
from meshwright.data.stream import Batch, Stream, Tokens, open_stream
from meshwright.data.tokenizer import Tokenizer, open_reader, open_tokenizer

if TYPE_CHECKING:
    from meshwright.data.loader import Batches, Samples, StepBatches, to_tensors

__all__ = [
    "END",
    "VOCABULARY",
    "Batch",
    "Batches",
    "Manifest",
    "Samples",
    "StepBatches",
    "Stream",
    "TokenFolder",
    "Tokenizer",
    "Tokens",
    "is_prepared",
    "open_folder",
    "open_reader",
    "open_stream",
    "open_tokenizer",
    "prepare",
    "to_tensors",
]


def __getattr__(name: str) -> Any:
    # The loader alone needs torch, which takes seconds and 200 MB: processes that tokenise never ask for it.
    if name in ("Batches", "Samples", "StepBatches", "to_tensors"):
        from meshwright.data import loader

        return getattr(loader, name)
    raise AttributeError(name)
