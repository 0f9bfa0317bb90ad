"""A run's state as safetensors shards and a JSON manifest; whole on disk or not there at all."""

from meshwright.checkpoint.convert import convert_run
from meshwright.checkpoint.huggingface import load_pretrained
from meshwright.checkpoint.load import load_checkpoint, read_model_weights
from meshwright.checkpoint.manifest import Manifest, read_manifest
from meshwright.checkpoint.save import CheckpointError, save_checkpoint

__all__ = [
    "CheckpointError",
    "Manifest",
    "convert_run",
    "load_checkpoint",
    "load_pretrained",
    "read_manifest",
    "read_model_weights",
    "save_checkpoint",
]
