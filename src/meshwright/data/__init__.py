"""Text to a token folder, and a token folder to samples that depend on (seed, step, index) alone."""

from meshwright.data.folder import END, VOCABULARY, Manifest, TokenFolder, is_prepared, open_folder
from meshwright.data.loader import Batches, Microbatches, to_tensor
from meshwright.data.prepare import prepare
from meshwright.data.stream import Stream, Tokens, open_stream

__all__ = [
    "END",
    "VOCABULARY",
    "Batches",
    "Manifest",
    "Microbatches",
    "Stream",
    "TokenFolder",
    "Tokens",
    "is_prepared",
    "open_folder",
    "open_stream",
    "prepare",
    "to_tensor",
]
