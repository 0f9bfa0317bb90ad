"""Jobs small enough to run in a moment."""

from pathlib import Path
from typing import Any

from meshwright.spec import Cluster, Device, Job, Link
from meshwright.spec.decode import decode_job

CPU = Device(
    name="cpu",
    kind="cpu",
    memory_bytes=4e9,
    memory_bytes_per_s=1e10,
    peak_bf16_flops_per_s=0,
    peak_fp32_flops_per_s=5e10,
    source="made up for tests",
)
LINK = Link(name="loopback", bytes_per_s=1e9, latency_s=1e-4, source="made up for tests")


def cpu_cluster(processes: int) -> Cluster:
    """A machine of `processes` CPU ranks."""
    return Cluster(device=CPU, devices_per_node=processes, intra=LINK, inter=LINK)


def tiny_job(folder: Path, *, processes: int = 1, **sections: dict[str, Any]) -> Job:
    """A job of five steps of a two-layer model on a small text, its run folder under `folder`."""
    text = folder / "text"
    if not text.exists():
        text.mkdir(parents=True)
        for number in range(40):
            words = " ".join(f"word{(number * 7 + i * i) % 97}" for i in range(120))
            (text / f"{number}.txt").write_text(words)
    table: dict[str, Any] = {
        "run": {"name": "tiny", "folder": str(folder / "runs"), "steps": 5, "seed": 3},
        "model": {
            "layers": 2,
            "d_model": 32,
            "heads": 4,
            "kv_heads": 2,
            # Odd on purpose: 4 ranks hold unequal parts of such tensors.
            "feed_forward": 90,
            "vocabulary": 257,
        },
        "data": {"path": str(text), "cache": str(folder / "tokens"), "sequence": 24, "global_batch": 8},
        "optimizer": {"name": "sgd", "learning_rate": 0.5, "warmup_steps": 2, "clip_norm": 0.5, "weight_decay": 0.01},
        "layout": {},
        "cluster": {"processes": processes},
        "evaluation": {"sequences": 4},
        "trace": {"every_steps": 0},
    }
    for name, section in sections.items():
        table[name] = table.get(name, {}) | section
    return decode_job(table, local=cpu_cluster)
