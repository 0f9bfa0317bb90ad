"""A job: model, data, optimizer, layout, cluster and run settings, concrete and checked."""

from pathlib import PurePath
from typing import Literal

import msgspec

from meshwright.spec.cluster import Cluster, Device, DeviceKind, check_cluster
from meshwright.spec.division import check_context, check_expert
from meshwright.spec.errors import SettingError
from meshwright.spec.layout import Layout, check_axes, check_layout, check_split
from meshwright.spec.model import ModelSpec, check_built, check_model, check_sequence
from meshwright.spec.numbers import LARGEST, check_range
from meshwright.spec.schedule import check_schedule
from meshwright.spec.trainer import MESHWRIGHT, Trainer, check_trainer

# A moment's decay must stay below 1.
LARGEST_BETA = 0.999999
# What training has been built for, of the devices that can be planned for.
TRAINED_KINDS: tuple[DeviceKind, ...] = ("cuda", "cpu")
# Files of numbers, which no tokenizer has to make.
TOKEN_FILES = {".npy", ".bin"}


class RunSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the run is called, where its folder goes, how long it lasts."""

    name: str
    folder: str = "runs"
    steps: int
    seed: int = 0


class Source(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of several places that tokens come from.

    weight: its share of the samples, against the other sources' weights.
    """

    path: str
    weight: float = 1.0


class DataSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where tokens come from and how many make a step.

    path: a folder of text or one such file, a prepared token folder, a file of tokens (.npy, .bin), or "stdlib":
        the source of the Python standard library found on the machine. Empty where there are `sources`.
    sources: several of these, each with its weight.
    tokenizer: "bytes", or a Hugging Face tokenizer.json or the folder that holds one.
    end_token: the text of the token that ends a document; of a file of tokens its number. "" asks the tokenizer.
    dtype: of the numbers in a .bin file.
    sequence: tokens per sample. global_batch: samples per optimizer step, whatever the layout.
    attention: what a token attends to, of what comes before it: all of its sample, or its own document's part of it.
    held_out: share of documents kept for evaluation, never trained on.
    cache: folder for prepared tokens.
    """

    path: str = "stdlib"
    sources: tuple[Source, ...] = ()
    tokenizer: str = "bytes"
    end_token: str = ""
    dtype: Literal["uint16", "uint32"] = "uint16"
    sequence: int
    global_batch: int
    attention: Literal["sample", "document"] = "sample"
    held_out: float = 0.05
    cache: str = ".meshwright/tokens"

    def named_sources(self) -> tuple[tuple[str, Source], ...]:
        """Every source behind the name of its setting: one, unless `sources` gives several."""
        if not self.sources:
            return (("data.path", Source(path=self.path)),)
        return tuple((f"data.sources[{number}].path", source) for number, source in enumerate(self.sources))


class OptimizerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """AdamW (or SGD, for comparing weights exactly) under linear warmup and cosine decay.

    Weight decay applies to matrices, not to norms. The last step's rate is learning_rate x final_rate (unless
    warmup takes the whole run).
    clip_norm 0 turns clipping off.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    warmup_steps: int = 0
    final_rate: float = 0.1
    clip_norm: float = 1.0


class EvaluationSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Held-out loss: before the first step, every `every_steps` (0: only first and last), and after the last."""

    every_steps: int = 0
    sequences: int = 64


class CheckpointSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Saves every `every_steps` (0: never), after the last step if `at_end`, and always when stopped.

    The newest `keep` stay (0: all).
    """

    every_steps: int = 0
    at_end: bool = True
    keep: int = 2


class TraceSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every `every_steps`-th step is profiled for the step account (0: none)."""

    every_steps: int = 50


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a run depends on. Copies are made with msgspec.structs.replace.

    trainer: the program that the job is planned for; only our own is one that `train` runs.
    """

    run: RunSettings
    model: ModelSpec
    data: DataSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    layout: Layout
    cluster: Cluster
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    trace: TraceSettings = TraceSettings()
    trainer: Trainer = MESHWRIGHT


def check_job(job: Job) -> None:
    """Raise SettingError for the first setting that cannot be honoured."""
    if job.optimizer.name == "sgd":
        default = OptimizerSettings()
        for setting in ("betas", "epsilon"):
            value = getattr(job.optimizer, setting)
            if value != getattr(default, setting):
                name = f"optimizer.{setting}"
                raise SettingError(f"{name} = {value}", "means nothing to sgd", f'{name} left out, or "adamw"')
    check_model(job.model)
    check_trainer(job.trainer)
    for setting, value, low, high in (
        ("run.steps", job.run.steps, 1, LARGEST),
        ("run.seed", job.run.seed, 0, 2**63 - 1),
        ("data.sequence", job.data.sequence, 1, LARGEST),
        ("data.global_batch", job.data.global_batch, 1, LARGEST),
        ("data.held_out", job.data.held_out, 0.0, 0.5),
        ("optimizer.learning_rate", job.optimizer.learning_rate, 0.0, 10.0),
        ("optimizer.betas[0]", job.optimizer.betas[0], 0.0, LARGEST_BETA),
        ("optimizer.betas[1]", job.optimizer.betas[1], 0.0, LARGEST_BETA),
        ("optimizer.epsilon", job.optimizer.epsilon, 1e-20, 1.0),
        ("optimizer.weight_decay", job.optimizer.weight_decay, 0.0, 10.0),
        ("optimizer.warmup_steps", job.optimizer.warmup_steps, 0, LARGEST),
        ("optimizer.final_rate", job.optimizer.final_rate, 0.0, 1.0),
        ("optimizer.clip_norm", job.optimizer.clip_norm, 0.0, 1e9),
        ("evaluation.every_steps", job.evaluation.every_steps, 0, LARGEST),
        ("evaluation.sequences", job.evaluation.sequences, 1, LARGEST),
        ("checkpoint.every_steps", job.checkpoint.every_steps, 0, LARGEST),
        ("checkpoint.keep", job.checkpoint.keep, 0, LARGEST),
        ("trace.every_steps", job.trace.every_steps, 0, LARGEST),
    ):
        check_range(setting, value, low, high)
    check_data(job.data)
    for setting, name in (("run.folder", job.run.folder), ("data.cache", job.data.cache)):
        if not name or not name.isprintable():
            raise SettingError(f'{setting} = "{name}"', "must be the name of a folder", f'{setting} = "a-folder"')
    name = job.run.name
    if not name or name != name.strip("./ ") or "/" in name or not name.isprintable():
        raise SettingError(f'run.name = "{name}"', "must be a plain folder name", 'run.name = "run"')
    if job.data.held_out == 0 and job.evaluation.every_steps:
        name = f"evaluation.every_steps = {job.evaluation.every_steps}"
        raise SettingError(name, "nothing is held out to evaluate on", "data.held_out = 0.05")
    check_sequence(job.model, job.data.sequence)
    check_axes(job.layout)
    # No other setting helps a layout that has too few devices.
    check_cluster(job.cluster, job.layout.world_size)
    check_layout(job.layout, job.data.global_batch)
    check_precision(job)
    # Before what else it needs: no size of the tensor axis would help here.
    if job.layout.async_tensor and not job.cluster.device.is_gpu:
        raise SettingError("layout.async_tensor = true", "needs GPUs", "layout.async_tensor = false")
    check_split(job.layout, job.model, job.data.sequence)
    check_context(job.layout, job.model, job.data.sequence)
    check_expert(job.layout, job.model)
    if job.layout.zero > 1 and not job.trainer.gathers and job.layout.parameter_shards > 1:
        reason = f"{job.trainer.name} keeps parameters whole"
        raise SettingError(f"layout.zero = {job.layout.zero}", reason, "layout.zero = 1")
    microbatches, own = job.layout.accumulation(job.data.global_batch), job.trainer.name == MESHWRIGHT.name
    check_schedule(job.layout, microbatches, job.model.layers, short=not own)
    check_offload(job)


def check_offload(job: Job) -> None:
    """Raise SettingError for offloading that the job's devices or its optimizer cannot do."""
    if job.layout.offload != "none" and not job.cluster.device.is_gpu:
        kind = job.cluster.device.kind
        reason = "devices are CPUs, whose memory is the host's" if kind == "cpu" else "is known of GPUs alone"
        raise SettingError(f'layout.offload = "{job.layout.offload}"', reason, 'layout.offload = "none"')
    if job.layout.offload == "optimizer" and job.optimizer.name == "sgd":
        raise SettingError('layout.offload = "optimizer"', "sgd keeps no states", 'layout.offload = "none"')


def check_precision(job: Job) -> None:
    """Raise SettingError for products that the job's devices do not have."""
    device = job.cluster.device
    if job.layout.precision == "fp8" and not device.peak_fp8_flops_per_s:
        near = "bf16" if device.is_accelerator else "fp32"
        reason = f"no fp8 products are known of {device.name}"
        raise SettingError('layout.precision = "fp8"', reason, f'layout.precision = "{near}"')


def check_kind(device: Device) -> None:
    """Raise SettingError for a device that can be planned for and not yet trained on."""
    if device.kind not in TRAINED_KINDS:
        reason = f"{device.name} can be planned for; training there is not built"
        near = "a job without [cluster], which takes what is here"
        raise SettingError(f'cluster.device.kind = "{device.kind}"', reason, near)


def check_trained(job: Job) -> None:
    """Raise SettingError for a job that can be planned and not yet trained."""
    check_built(job.model)
    check_kind(job.cluster.device)
    device, precision = job.cluster.device, job.layout.precision
    if precision == "fp8":
        reason = "can be planned; training with it is not built yet"
        raise SettingError('layout.precision = "fp8"', reason, 'layout.precision = "bf16"')
    if precision == "bf16" and device.peak_fp16_flops_per_s and not device.peak_bf16_flops_per_s:
        reason = f"{device.name} has none, and training in fp16, as it is planned there, is not built"
        raise SettingError('layout.precision = "bf16"', reason, 'layout.precision = "fp32"')


def check_data(data: DataSettings) -> None:
    """Raise SettingError where the sources are not clear, or where a setting would do nothing."""
    if data.sources and data.path:
        reason = "data.sources is given too, and each names what to train on"
        raise SettingError(f'data.path = "{data.path}"', reason, 'data.path = "", or left out')
    for setting, source in data.named_sources():
        if not source.path or not source.path.isprintable():
            raise SettingError(
                f'{setting} = "{source.path}"', "must be the name of a folder or file", f'{setting} = "a-folder"'
            )
        if not 0 < source.weight < float("inf"):
            name = setting.replace(".path", ".weight")
            raise SettingError(f"{name} = {source.weight}", "must be a number above 0", f"{name} = 1.0")
    for setting, name in (("data.tokenizer", data.tokenizer), ("data.end_token", data.end_token or "-")):
        if not name or not name.isprintable():
            raise SettingError(f'{setting} = "{name}"', "cannot be printed, or is empty", 'data.tokenizer = "bytes"')
    suffixes = {PurePath(source.path).suffix for _, source in data.named_sources()}
    if data.dtype != "uint16" and ".bin" not in suffixes:
        raise SettingError(f'data.dtype = "{data.dtype}"', "is for a .bin file, and none is given", "leave it out")
    if data.end_token and data.tokenizer == "bytes" and not suffixes & TOKEN_FILES:
        reason = "byte-level tokens end a document with 256, always"
        raise SettingError(f'data.end_token = "{data.end_token}"', reason, "leave it out, or give data.tokenizer")
