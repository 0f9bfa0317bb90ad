"""Text to a token folder, and a token folder to samples that depend on (seed, step, index) alone."""

from meshwright.data.folder import END, VOCABULARY, Manifest, TokenFolder, is_prepared, open_folder
from meshwright.data.loader import Batches, StepBatches, to_tensors
from meshwright.data.prepare import prepare
from meshwright.data.stream import Batch, Stream, Tokens, open_stream

__all__ = [
    "END",
    "VOCABULARY",
    "Batch",
    "Batches",
    "Manifest",
    "StepBatches",
    "Stream",
    "TokenFolder",
    "Tokens",
    "is_prepared",
    "open_folder",
    "open_stream",
    "prepare",
    "to_tensors",
]
