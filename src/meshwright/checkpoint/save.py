"""Saving: every rank writes its part, the manifest comes last, and a rename makes the checkpoint exist."""

import os
import shutil
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from meshwright.checkpoint.manifest import (
    Entry,
    Manifest,
    Part,
    ShardIndex,
    State,
    checksum,
    named_state,
)
from meshwright.parallel import PartOptimizer, Stages
from meshwright.record import MANIFEST, RunFolder, replace_text
from meshwright.spec import Layout


class CheckpointError(Exception):
    """A checkpoint could not be saved. What was saved before is untouched."""


def save_checkpoint(
    folder: RunFolder, step: int, model: Stages, optimizer: PartOptimizer, layout: Layout, *, corpus: str, keep: int
) -> Path:
    """Save the state after `step` steps; all ranks call it together. Returns the checkpoint's folder.

    Raises CheckpointError on every rank if any rank failed; the unfinished folder is removed and the earlier
    checkpoints stay. Otherwise all but the newest `keep` are removed (0: none).
    """
    rank = dist.get_rank()
    final = folder.checkpoint(step)
    partial = folder.checkpoints / f".step-{step}.partial"
    if final.exists():
        return final
    reason = _on_rank_zero(rank, lambda: _make_empty(partial))
    agree(reason, step, folder)
    reason = attempt_to(lambda: write_shard(partial, rank, model, optimizer))
    try:
        agree(reason, step, folder)
        reason = _on_rank_zero(rank, lambda: finish(partial, final, step, layout, corpus))
        agree(reason, step, folder)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if rank == 0 and keep:
        for old in folder.saved_steps()[:-keep]:
            shutil.rmtree(folder.checkpoint(old), ignore_errors=True)
    return final


def write_shard(partial: Path, rank: int, model: Stages, optimizer: PartOptimizer) -> None:
    """Write this rank's parts of the state, and beside them an index for the manifest."""
    file = f"rank-{rank}.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    entries: dict[str, Entry] = {}
    for state in named_state(model, optimizer):
        if is_first_copy(state) and state.part.numel():
            tensors[state.name] = state.part.cpu().contiguous()
            part = Part(file=file, offset=state.offset, shape=state.shape)
            entries[state.name] = Entry(shape=state.whole, parts=[part])
    save_file(tensors, partial / file)
    with (partial / file).open("rb") as written:
        os.fsync(written.fileno())
        crc32 = checksum(written)
    index = ShardIndex(entries=entries, file=file, bytes=(partial / file).stat().st_size, crc32=crc32)
    replace_text(partial / f"rank-{rank}.json", msgspec.json.encode(index).decode())


def is_first_copy(state: State) -> bool:
    """Whether this rank is the one that writes its part of a state, among those that hold the same."""
    assert isinstance(state.parameter, DTensor)
    coordinates = state.parameter.device_mesh.get_coordinate()
    assert coordinates is not None
    split = [state.spread and not placement.is_replicate() for placement in state.parameter.placements]
    return all(c == 0 for c, cut in zip(coordinates, split, strict=True) if not cut)


def finish(partial: Path, final: Path, step: int, layout: Layout, corpus: str) -> None:
    """Join the ranks' indices into the manifest and rename the folder into place."""
    entries: dict[str, Entry] = {}
    files: dict[str, tuple[int, int]] = {}
    for path in sorted(partial.glob("rank-*.json")):
        index = msgspec.json.decode(path.read_bytes(), type=ShardIndex)
        files[index.file] = (index.bytes, index.crc32)
        for name, entry in index.entries.items():
            entries.setdefault(name, Entry(shape=entry.shape, parts=[])).parts.extend(entry.parts)
        path.unlink()
    manifest = Manifest(step=step, corpus=corpus, layout=layout, entries=entries, files=files)
    replace_text(partial / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest)).decode() + "\n")
    partial.rename(final)
    # The rename itself must survive a power cut.
    directory = os.open(final.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def _make_empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _on_rank_zero(rank: int, action) -> str:
    return attempt_to(action) if rank == 0 else ""


def attempt_to(action) -> str:
    """Do it and return why it failed; nothing if it did not. safetensors reports a full disk by its own exception."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return str(error) or type(error).__name__
    return ""


def agree(reason: str, step: int, folder: RunFolder) -> None:
    """Let every rank go on, or none: raise CheckpointError everywhere if anyone gives a reason."""
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    failed = [f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why]
    if failed:
        kept = folder.saved_steps()
        newest = f"the newest whole checkpoint is step {kept[-1]}" if kept else "there is no earlier checkpoint"
        raise CheckpointError(f"step {step} could not be saved to {folder.checkpoints} ({failed[0]}); {newest}")
