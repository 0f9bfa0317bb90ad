"""A run goes on bit for bit from its checkpoint, and no mishap at a save or on disk takes one away."""

import errno
import json
import shutil
import signal
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
import torch
from jobs import tiny_job
from ranks import run_ranks
from safetensors import safe_open
from training import Tensors, new_attempt, new_run, train_rank, weights

from meshwright.checkpoint import CheckpointError, load_checkpoint, read_manifest, save
from meshwright.data import open_stream
from meshwright.parallel import build_mesh, build_parallel_model, start_distributed, stop_distributed
from meshwright.record import Evaluation, Fault, Metrics, RunFolder, read_events, read_lines, read_metrics
from meshwright.spec import AXES, Job, SettingError, parameter_shapes
from meshwright.train.optimizer import build_optimizer

ADAMW = {"name": "adamw", "learning_rate": 0.01}
LAYOUTS: list[dict[str, int]] = [
    {"replica": 2},
    {"shard": 2, "zero": 1, "microbatch": 2},
    {"shard": 2, "zero": 2, "microbatch": 2},
    {"shard": 2, "zero": 3},
    {"replica": 2, "shard": 2, "zero": 3},
    {"tensor": 2},
    {"shard": 2, "tensor": 2, "zero": 2},
]


def name_of(layout: dict[str, int]) -> str:
    return "-".join(f"{key}{value}" for key, value in layout.items())


def a_job(folder: Path, layout: dict[str, int], name: str, **sections: dict[str, Any]) -> Job:
    sections = {"optimizer": ADAMW, "layout": layout} | sections
    sections["run"] = {"name": name} | sections.get("run", {})
    return tiny_job(folder, processes=prod(layout.get(axis, 1) for axis in AXES), **sections)


def train(job: Job, folder: RunFolder, attempt: int) -> None:
    run_ranks(job.layout.world_size, train_rank, job, folder, attempt)


def trained(job: Job) -> RunFolder:
    folder, attempt = new_run(job)
    train(job, folder, attempt)
    return folder


def losses(folder: RunFolder) -> list[tuple[float | None, float | None]]:
    return [(line.loss, line.gradient_norm) for line in read_metrics(folder)[0]]


def cut_after(folder: RunFolder, step: int) -> None:
    """As if the run had ended with the checkpoint of `step`: later ones are gone."""
    for later in folder.checkpoints.glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(each, id=name_of(each), marks=[pytest.mark.slow] * (each in LAYOUTS[:6:2])) for each in LAYOUTS],
)
def test_resuming_is_as_if_nothing_had_happened(tmp_path: Path, layout: dict[str, int]) -> None:
    job = a_job(tmp_path, layout, "one", checkpoint={"every_steps": 2, "keep": 0})
    folder = trained(job)
    whole, end = losses(folder), weights(job, folder)
    assert len(whole) == 5

    cut_after(folder, 2)
    folder.metrics.unlink()
    train(job, folder, new_attempt(folder, job))
    lines = read_metrics(folder)[0]
    assert [line.step for line in lines] == [2, 3, 4]
    assert losses(folder) == whole[2:]
    again = weights(job, folder)
    assert all(torch.equal(again[name], end[name]) for name in end)


def test_another_layout_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    first = a_job(tmp_path, {"shard": 3, "zero": 2, "microbatch": 1}, "one", data={"global_batch": 12})
    whole, end = losses(trained(first)), weights(first, RunFolder(tmp_path / "runs" / "one"))
    short = a_job(
        tmp_path, {"shard": 3, "zero": 2}, "two", data={"global_batch": 12}, checkpoint={"every_steps": 2, "keep": 0}
    )
    folder = trained(short)
    cut_after(folder, 2)
    other = a_job(tmp_path, {"replica": 2, "shard": 2, "zero": 3}, "two", data={"global_batch": 12})
    train(other, folder, new_attempt(folder, other))
    for (loss, norm), (expected, expected_norm) in zip(losses(folder), whole, strict=True):
        assert loss == pytest.approx(expected, rel=1e-5) and norm == pytest.approx(expected_norm, rel=1e-5)
    for name, tensor in weights(other, folder).items():
        # Adam amplifies round-off where a gradient is nearly zero, so the tensor's norm is compared, not its elements.
        difference = torch.linalg.vector_norm(tensor - end[name]) / torch.linalg.vector_norm(end[name])
        assert difference < 1e-5, name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, RunFolder]:
    """A run of 5 steps with checkpoints of 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("saved")
    job = a_job(folder, {"replica": 2, "shard": 2}, "one", checkpoint={"every_steps": 2, "keep": 0})
    return job, trained(job)


def copy_of(saved: tuple[Job, RunFolder], to: Path) -> RunFolder:
    shutil.copytree(saved[1].path, to / "run")
    return RunFolder(to / "run")


def test_a_checkpoint_is_safetensors_and_json(saved: tuple[Job, RunFolder]) -> None:
    job, folder = saved
    step = folder.checkpoints / "step-5"
    manifest = read_manifest(step)
    assert (manifest.step, manifest.layout) == (5, job.layout)
    assert {p.name for p in step.iterdir()} == {*manifest.files, "manifest.json"}
    shapes = parameter_shapes(job.model)
    kinds = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step")
    assert set(manifest.entries) == {f"{kind}.{name}" for kind in kinds for name in shapes}
    held: dict[str, int] = dict.fromkeys(manifest.entries, 0)
    for path in step.iterdir():
        assert path.read_bytes()[:2] != b"\x80\x04" and not path.read_bytes().startswith(b"PK")
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    held[name] += file.get_tensor(name).numel()
    # Each element is there once, copies of replicas are not.
    for name, shape in shapes.items():
        assert held[f"model.{name}"] == held[f"optimizer.exp_avg.{name}"] == torch.Size(shape).numel()
        assert held[f"optimizer.step.{name}"] == 1


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (0, [2, 4, 5])])
def test_the_newest_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    job = a_job(tmp_path, {}, "one", checkpoint={"every_steps": 2, "keep": keep})
    folder = trained(job)
    assert sorted(int(p.name.removeprefix("step-")) for p in folder.checkpoints.iterdir()) == left


def load(job: Job, folder: RunFolder, step: int) -> int:
    """Load a checkpoint in a rank."""
    device = start_distributed(job.cluster)
    model = build_parallel_model(job, build_mesh(job.layout, device), device)
    try:
        corpus = open_stream(job).checksum
        return load_checkpoint(folder.checkpoint(step), model, build_optimizer(model, job.optimizer), corpus)
    finally:
        stop_distributed()


def refused_load(job: Job, folder: RunFolder, step: int) -> tuple[str, str, str]:
    try:
        load(job, folder, step)
    except SettingError as error:
        return error.setting, error.reason, error.nearest
    raise AssertionError("it was loaded")


def test_a_half_written_checkpoint_is_not_one(saved: tuple[Job, RunFolder], tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    (folder.checkpoints / "step-5" / "manifest.json").unlink()
    (folder.checkpoints / "step-4").rename(folder.checkpoints / ".step-4.partial")
    assert folder.saved_steps()[-1] == 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("harm", "says"),
    [(flip, "is damaged"), (shorten, "is damaged"), (Path.unlink, "No such file")],
    ids=["a bit", "cut short", "gone"],
)
def test_a_damaged_shard_is_refused(
    saved: tuple[Job, RunFolder], tmp_path: Path, harm: Callable[[Path], None], says: str
) -> None:
    folder = copy_of(saved, tmp_path)
    harm(folder.checkpoints / "step-5" / "rank-1.safetensors")
    # Whatever the layout that reads it.
    setting, reason, nearest = run_ranks(1, refused_load, one_process(saved[0]), folder, 5)[0]
    assert "step-5" in setting and says in reason and "rank-1.safetensors" in reason
    assert nearest.startswith("rm -r ") and "step-5" in nearest
    assert run_ranks(1, load, one_process(saved[0]), folder, 4) == [4]


def one_process(job: Job, **model: Any) -> Job:
    return msgspec.structs.replace(
        job,
        layout=msgspec.structs.replace(job.layout, replica=1, shard=1),
        model=msgspec.structs.replace(job.model, **model),
    )


def test_a_manifest_that_is_no_json_is_refused(saved: tuple[Job, RunFolder], tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    (folder.checkpoints / "step-5" / "manifest.json").write_text("{")
    with pytest.raises(SettingError, match="damaged manifest"):
        read_manifest(folder.checkpoints / "step-5")


@pytest.mark.parametrize(
    ("change", "says"),
    [({"feed_forward": 80}, "has shape (90, 32)"), ({"layers": 3}, "holds no tensor model.blocks.2")],
)
def test_another_model_is_refused(saved: tuple[Job, RunFolder], change: dict[str, int], says: str) -> None:
    _, reason, nearest = run_ranks(1, refused_load, one_process(saved[0], **change), saved[1], 5)[0]
    assert says in reason and nearest == "the job that wrote it"


def full_disk(when: Callable[[Path], bool]) -> Any:
    """safetensors' save_file that finds the disk full for some files."""
    save_file = save.save_file

    def saving(tensors: Tensors, path: Path) -> None:
        if when(Path(path)):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    return mock.patch.object(save, "save_file", saving)


def train_on_full_disk(job: Job, folder: RunFolder, attempt: int, steps: tuple[int, ...]) -> str:
    """Train with a disk that is full for rank 1 at the saves after `steps`; return how it was refused."""
    with full_disk(
        lambda path: path.name.startswith("rank-1") and path.parent.name in {f".step-{s}.partial" for s in steps}
    ):
        try:
            train_rank(job, folder, attempt)
        except SettingError as error:
            return str(error)
    return ""


def test_a_full_disk_on_the_way_costs_a_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = a_job(tmp_path, {"shard": 2}, "one", checkpoint={"every_steps": 2, "keep": 0})
    folder, attempt = new_run(job)
    assert run_ranks(2, train_on_full_disk, job, folder, attempt, (4,)) == ["", ""]
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["step-2", "step-5"]
    assert [line.step for line in read_metrics(folder)[0]] == [0, 1, 2, 3, 4]
    warning = capfd.readouterr().err
    assert warning.count("warning: ") == 1 and "training goes on" in warning
    assert "rank 1: [Errno 28] No space left on device" in warning and "newest whole checkpoint is step 2" in warning
    faults = [line for lines in read_events(folder, 0).values() for line in lines if isinstance(line, Fault)]
    assert [fault.step for fault in faults] == [4, 4]


def test_a_full_disk_at_the_end_is_refused_and_what_was_saved_stays(tmp_path: Path) -> None:
    job = a_job(tmp_path, {"shard": 2}, "one", checkpoint={"every_steps": 2, "keep": 1})
    folder, attempt = new_run(job)
    told = run_ranks(2, train_on_full_disk, job, folder, attempt, (5,))
    assert all("step 5 could not be saved" in line and "newest whole checkpoint is step 4" in line for line in told)
    assert all(f"free space there, then meshwright train --resume {folder.path}" in line for line in told)
    assert [p.name for p in folder.checkpoints.iterdir()] == ["step-4"]
    assert [line.step for line in read_metrics(folder)[0]] == [0, 1, 2, 3, 4]
    # With room again the run goes on, and ends as if nothing had happened.
    train(job, folder, new_attempt(folder, job))
    end = weights(job, folder)
    other = a_job(tmp_path, {"shard": 2}, "two")
    expected = weights(other, trained(other))
    assert all(torch.equal(end[name], expected[name]) for name in expected)


def train_with_small_files(job: Job, folder: RunFolder, attempt: int) -> str:
    """Train where no file may grow beyond a size that a checkpoint's does: a real write that fails in the middle."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    try:
        train_rank(job, folder, attempt)
    except SettingError as error:
        return str(error)
    return ""


def test_a_write_that_fails_in_the_middle(tmp_path: Path) -> None:
    job = a_job(tmp_path, {"shard": 2}, "one")
    prepared = trained(msgspec.structs.replace(job, run=msgspec.structs.replace(job.run, name="before")))
    assert prepared.saved_steps()[-1] == 5
    folder, attempt = new_run(job)
    told = run_ranks(2, train_with_small_files, job, folder, attempt)
    assert all("could not be saved" in line and "there is no earlier checkpoint" in line for line in told), told
    assert list(folder.checkpoints.iterdir()) == []
    # The lines are shorter than the limit: none is lost.
    assert [line.step for line in read_lines(folder.metrics, Metrics)] == [0, 1, 2, 3, 4]
    assert len(list(read_lines(folder.metrics, Evaluation))) == 2


def fail_to_finish(job: Job, folder: RunFolder) -> str:
    """A save whose manifest cannot be written: every rank is told."""
    device = start_distributed(job.cluster)
    model = build_parallel_model(job, build_mesh(job.layout, device), device)

    def failing(*_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with mock.patch.object(save, "finish", failing):
        try:
            save.save_checkpoint(folder, 9, model, build_optimizer(model, job.optimizer), job.layout, corpus="", keep=1)
        except CheckpointError as error:
            return str(error)
        finally:
            stop_distributed()
    return ""


def test_a_manifest_that_cannot_be_written_is_no_checkpoint(saved: tuple[Job, RunFolder], tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path)
    told = run_ranks(4, fail_to_finish, saved[0], folder)
    assert all("rank 0: [Errno 122] Disk quota exceeded" in line for line in told)
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["step-2", "step-4", "step-5"]
    assert json.loads((folder.checkpoints / "step-5" / "manifest.json").read_bytes())["step"] == 5


def test_a_resumed_run_refuses_other_text(saved: tuple[Job, RunFolder], tmp_path: Path) -> None:
    job, folder = saved
    changed = tmp_path / "changed"
    shutil.copytree(job.data.path, changed)
    next(changed.iterdir()).write_text("other words than before")
    other = msgspec.structs.replace(job, data=msgspec.structs.replace(job.data, path=str(changed)))
    refusals = run_ranks(job.layout.world_size, refused_load, other, folder, 5)
    assert all("is not the text" in reason for _, reason, _ in refusals)
