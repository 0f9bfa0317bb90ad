"""Published measurements (CSV rows) as jobs that the planner can be asked about: one reading for all rows."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from meshwright.spec import (
    TRAINERS,
    Cluster,
    DataSettings,
    Experts,
    Job,
    Layout,
    Link,
    ModelSpec,
    Precision,
    RunSettings,
    SettingError,
    Trainer,
    check_job,
)
from meshwright.spec.hardware import NODES, cluster_of

# What a row's `gpu` begins with -> row of the hardware table; the first that matches counts.
GPUS = (
    ("A100-40", "a100-40"),
    ("A100", "a100-80"),
    ("H100-96", "h100-96"),
    ("H100", "h100"),
    ("H200", "h200"),
    ("GB200", "gb200"),
    ("GB300", "gb300"),
    ("B200", "b200"),
    ("V100", "v100"),
)
# A word of a row's `framework`, in lower case -> trainer; the first that matches counts.
FRAMEWORKS = (
    ("torchtitan", "torchtitan"),
    ("zero-3", "deepspeed-zero3"),
    ("llm-foundry", "fsdp"),
    ("composer", "fsdp"),
    ("megatron-core", "megatron-core"),
    ("nemo", "nemo"),
    ("megatron-deepspeed", "megatron-deepspeed"),
    ("megatron", "megatron-lm"),
    ("fsdp", "fsdp"),
    ("aa-scaling", "aleph-alpha-scaling"),
    ("1f1b", "megatron-deepspeed"),
)
# What a file of rows has columns for.
COLUMNS = [
    "hidden",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "ffn",
    "act",
    "arch",
    "vocab",
    "tied_emb",
    "n_experts",
    "topk",
    "seq_len",
    "gpu",
    "gpu_mem_gb",
    "n_gpus",
    "gpus_per_node",
    "interconnect",
    "framework",
    "precision",
    "dp",
    "zero",
    "tp",
    "sp",
    "cp",
    "pp",
    "vpp",
    "ep",
    "mbs",
    "gbs",
    "recompute",
    "attn",
    "step_time_s",
    "step_time_kind",
    "mem_gib",
    "mem_kind",
    "status",
    "id",
    "dataset",
    "model",
    "notes",
]
# Where a row does not say how many tokens its model knows.
USUAL_VOCABULARY = 50_304


class Unread(Exception):
    """A row that says too little, or something that no job can say."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement. job: what was run. step_s, memory_gib: 0 where not measured. fits: False where it ran out of
    memory. group: rows of one trainer and device. alike: what rows have in common that differ by chance alone."""

    id: str
    source: str
    group: str
    alike: str
    job: Job
    cells: dict[str, str]
    step_s: float
    memory_gib: float
    fits: bool


def read_rows(path: Path) -> Iterator[Row | tuple[str, str]]:
    """Every row of a file: as a job, or (id, why it is none). Raises SettingError for a file of something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SettingError(str(path), f"cannot be read: {error}", "a file of published rows") from None
    with io.StringIO(text, newline="") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise SettingError(str(path), f"has no column {missing[0]}{more}", "a file of published rows")
        for cells in reader:
            try:
                yield read_row(cells)
            except (Unread, SettingError) as error:
                yield cells["id"], f"{cells['dataset']}: {error}"


def read_row(cells: dict[str, str]) -> Row:
    """One row."""
    model, trainer = read_model(cells), read_trainer(cells)
    layout = read_layout(cells, model, trainer)
    job = Job(
        run=RunSettings(name=cells["id"], steps=1),
        model=model,
        data=DataSettings(sequence=whole(cells, "seq_len"), global_batch=whole(cells, "gbs")),
        layout=layout,
        cluster=read_cluster(cells),
        trainer=trainer,
    )
    check_job(job)
    measured = ("id", "step_time_s", "mem_gib", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu_pct", "hfu_pct")
    told = ("quality", "transcription", "source_repo", "source_path", "source_rev", "notes")
    return Row(
        id=cells["id"],
        source=cells["dataset"],
        group=f"{cells['framework'].strip()} on {cells['gpu']}",
        alike="|".join(value for name, value in cells.items() if name not in (*measured, *told)),
        job=job,
        cells=cells,
        # Kernels that are deterministic are not those that anybody trains with for speed.
        step_s=0.0 if "deterministic" in cells["step_time_kind"] else number(cells, "step_time_s"),
        memory_gib=number(cells, "mem_gib"),
        fits=cells["status"] != "oom",
    )


def number(cells: dict[str, str], name: str, missing: float = 0.0) -> float:
    """A cell's number."""
    try:
        return float(cells[name])
    except ValueError:
        return missing


def whole(cells: dict[str, str], name: str, missing: int | None = None) -> int:
    """A cell's whole number."""
    value = number(cells, name, -1.0)
    if value < 0:
        if missing is None:
            raise Unread(f"{name} = {cells[name]!r} is no number")
        return missing
    return int(value)


def vocabulary_of(text: str) -> int:
    """The tokens that a row's model knows: 51200, "128k (paper)", "50257 (GPT-2 BPE files)"."""
    thousands = re.search(r"(\d+)k\b", text)
    plain = re.match(r"\s*~?(\d{4,})", text)
    if plain:
        return int(plain[1])
    return int(thousands[1]) * 1000 if thousands else USUAL_VOCABULARY


def read_model(cells: dict[str, str]) -> ModelSpec:
    """The row's model; GPT is GPT-2's family, and LLaMA is llama's."""
    d_model = whole(cells, "hidden")
    heads = whole(cells, "n_heads", usual_heads(d_model, whole(cells, "tp")))
    gated, experts = cells["act"] in ("swiglu", "silu"), read_experts(cells)
    if "Mamba" in cells["arch"]:
        raise Unread("blocks that are no transformer's are not read")
    sequence, vocabulary = whole(cells, "seq_len"), vocabulary_of(cells["vocab"])
    if "megatron" in cells["framework"].lower():
        # Megatron rounds up so that ranks of the tensor axis divide it (--make-vocab-size-divisible-by, 128).
        multiple = 128 * whole(cells, "tp")
        vocabulary = -(-vocabulary // multiple) * multiple
    return ModelSpec(
        name="custom",
        family=("mixtral" if gated else "gpt2-moe") if experts else "llama" if gated else "gpt2",
        layers=whole(cells, "n_layers"),
        d_model=d_model,
        heads=heads,
        kv_heads=whole(cells, "n_kv_heads", heads),
        head_dim=d_model // heads,
        feed_forward=whole(cells, "ffn", 4 * d_model),
        vocabulary=vocabulary,
        max_positions=0 if gated else sequence,
        tied_embeddings=cells["tied_emb"] == "1",
        experts=experts,
    )


def usual_heads(d_model: int, tensor: int) -> int:
    """How many heads make a state of this width, each as near to 128 numbers as can be, where ranks divide them."""
    counts = [heads for heads in range(tensor, d_model + 1, tensor) if d_model % heads == 0]
    return min(counts, key=lambda heads: abs(d_model / heads - 128), default=1)


def read_experts(cells: dict[str, str]) -> Experts | None:
    """A mixture's numbers: "MoE: expert_ffn=2048 shared=512 layer_freq=1 MLA=False"."""
    if not whole(cells, "n_experts", 0):
        return None
    told = dict(re.findall(r"(\w+)=(\S+)", cells["arch"]))
    if told.get("MLA") == "True":
        raise Unread("latent attention's ranks are not told")
    width, shared = int(told.get("expert_ffn", cells["ffn"])), told.get("shared", "")
    if told.get("layer_freq", "1") != "1" or (shared.isdigit() and int(shared) % width):
        raise Unread("layers, or shared experts, that are not like the others")
    return Experts(
        count=whole(cells, "n_experts"),
        per_token=whole(cells, "topk"),
        feed_forward=width,
        shared=int(shared) // width if shared.isdigit() else 0,
    )


def read_trainer(cells: dict[str, str]) -> Trainer:
    """The program by its name, with what the row says of it."""
    framework, kernel = cells["framework"].lower(), cells["attn"].lower()
    name = next((trainer for word, trainer in FRAMEWORKS if word in framework), None)
    if name is None:
        raise Unread(f"framework {cells['framework']!r} is not known")
    trainer = TRAINERS[name]
    changes: dict[str, object] = {}
    if "not flash" in kernel or "no flash" in kernel or kernel.startswith(("fused", "unfused")):
        # Transformer Engine's unfused attention has a kernel for softmax all the same.
        plain = kernel.startswith("unfused") and not trainer.compiled
        changes["attention"] = "plain" if plain else "fused-softmax"
    elif "cudnn" in kernel:
        changes["attention"] = "cudnn"
    elif "flash" in kernel:
        changes["attention"] = "flash-1" if re.search(r"v1\.|flash_attention$", kernel) else "flash"
    elif kernel.startswith("torch"):
        changes["attention"] = "plain"
    elif "impl=local" in cells["arch"]:
        # Megatron-Core's blocks without Transformer Engine.
        changes["attention"] = "fused-softmax"
    if cells["act"] in ("swiglu", "silu"):
        # LLaMA has no dropout; norms are one kernel where the row says so, or where all is compiled.
        changes |= {"dropout": False, "fused_norms": trainer.compiled or "rms kernel" in kernel}
    if expert_tensor(cells) > 1:
        changes["splits_experts"] = True
    if not zero_of(cells["zero"]):
        changes["splits_states"] = False
    if cells["sp"] in ("0", "1") and whole(cells, "tp") > 1:
        changes["sequence_parallel"] = cells["sp"] == "1"
    if "fp32 grad-accum" in cells["precision"]:
        # Added up in fp32 beside those of one microbatch.
        changes["gradient_bytes"] = trainer.gradient_bytes + 4
    if "eager" in cells["precision"]:
        changes |= {"compiled": False, "fused_norms": True}
    return msgspec.structs.replace(trainer, **changes)


def read_layout(cells: dict[str, str], model: ModelSpec, trainer: Trainer) -> Layout:
    """The row's layout. Data-parallel ranks share states as `zero` says; a chain of stages may be interleaved."""
    data, zero = whole(cells, "dp"), zero_of(cells["zero"])
    pipeline, held = whole(cells, "pp"), whole(cells, "vpp", 1)
    stages = pipeline * held if pipeline > 1 else 1
    recompute, tensor = cells["recompute"].lower(), whole(cells, "tp")
    # Ranks that divide experts, and each expert's matrices.
    expert = whole(cells, "ep", 1) * expert_tensor(cells) if model.experts else 1
    divided = bool(zero) or expert > whole(cells, "cp", 1) * tensor
    # Megatron-Core's --num-distributed-optimizer-instances: so many groups of ranks have all states, each.
    copies = 2 if zero and "multi_dist_optimizer_instances" in cells["model"] else 1
    return Layout(
        pipeline=pipeline,
        replica=copies if divided else data,
        shard=data // copies if divided else 1,
        context=whole(cells, "cp", 1),
        tensor=tensor,
        expert=expert,
        microbatch=whole(cells, "mbs"),
        # A trainer that gathers nothing has parameters whole. (Megatron-FSDP divides them, but its tests hold between
        # steps what whole ones take too.)
        zero=(zero or 3) if trainer.gathers else 1,
        recompute="full"
        if recompute.startswith("full")
        else model.layers // 2
        if recompute == "selective layer"
        else "selective"
        if recompute.startswith("selective")
        else "none",
        async_tensor=tensor > 1 and ("asynctp" in cells["precision"].lower() or trainer.name == "nemo"),
        schedule="interleaved" if held > 1 and pipeline > 1 else "1f1b",
        # Blocks lie evenly unless they cannot.
        stage_layers=(model.layers // stages,) * stages if stages > 1 and model.layers % stages == 0 else (),
        stages_per_rank=held if held > 1 and pipeline > 1 else 0,
        precision=precision_of(cells["precision"]),
    )


def precision_of(text: str) -> Precision:
    """Of matrix products: half precisions are alike."""
    if "fp4" in text or "rowwise" in text:
        raise Unread(f"precision {text!r} is not planned")
    return "fp8" if "fp8" in text or "float8" in text else "bf16"


def expert_tensor(cells: dict[str, str]) -> int:
    """Ranks along tensor that divide each expert: Megatron-Core's ETP, which is tensor's size where it is not told."""
    told = re.search(r"ETP=(\d+)", cells["notes"])
    return int(told[1]) if told else whole(cells, "tp")


def zero_of(text: str) -> Literal[0, 1, 2, 3]:
    """1, 2 or 3; 0 where states are not shared."""
    text = text.lower()
    if "grad_op" in text or text.startswith("2"):
        return 2
    if "fsdp" in text or text.startswith("3"):
        return 3
    return 1 if text.startswith("1") else 0


def read_cluster(cells: dict[str, str]) -> Cluster:
    """The row's GPUs out of the hardware table; between nodes what the row says of its network."""
    name = next((known for word, known in GPUS if cells["gpu"].startswith(word)), None)
    if name is None or name not in NODES:
        raise Unread(f"device {cells['gpu']!r} is not in the hardware table")
    per_node, gpus = whole(cells, "gpus_per_node", 8), whole(cells, "n_gpus")
    per_node = min(per_node, gpus)
    cluster = cluster_of(f"{-(-gpus // per_node)}x{per_node}x{name}")
    node_bytes_per_s = network_of(cells["interconnect"])
    if not node_bytes_per_s:
        return cluster
    link = Link(
        name=cells["interconnect"],
        bytes_per_s=node_bytes_per_s / whole(cells, "gpus_per_node", 8),
        latency_s=cluster.inter.latency_s,
        source="the row",
    )
    return msgspec.structs.replace(cluster, inter=link)


def network_of(text: str) -> float:
    """Bytes a second out of a node as a row's words have it: "8x200 Gb/s HDR IB per node"; 0 where they do not."""
    if each := re.search(r"(\d+) ?x (?:[A-Z][\w-]* )*(\d+) ?Gb/s|(\d+) ?x ?(\d+) ?Gb/s", text):
        ports, gbit_per_s = [int(digits) for digits in each.groups() if digits]
        return ports * gbit_per_s / 8 * 1e9
    if node := re.search(r"(\d+) Gb/s (?:\w+ )*per node", text):
        return int(node[1]) / 8 * 1e9
    if gpu := re.search(r"(\d+) Gb/s RDMA per GPU", text):
        return int(gpu[1]) / 8 * 1e9 * 8
    if omni := re.search(r"(\d+)x Omni-Path", text):
        # 100 Gb/s each: Intel Omni-Path 100 series.
        return int(omni[1]) * 100 / 8 * 1e9
    return 0.0
