"""This machine as a cluster: its GPUs as nvidia-smi names them, or processes that share its cores."""

import os
import platform
import re
import subprocess
from pathlib import Path

import msgspec

from meshwright.spec import Cluster, Device, Link, SettingError
from meshwright.spec.devices import Node
from meshwright.spec.hardware import match_gpu, unknown_gpu
from meshwright.spec.links import share_ports

# On an otherwise idle machine; another one's figures differ: `meshwright calibrate` measures them.
MEASURED = "measured on a 2-core x86 virtual machine, 2026-11-22, torch 2.13.0"
CPU_COPY_BYTES_PER_S = 32e9
# What a source says of it begins so.
BANDWIDTH = "; memory bandwidth "
# Bandwidth of an all-reduce of 16 MiB in 2 processes, and in 4 on the 2 cores: a process that is not running cannot
# pass a part on. Latency as training sees it: a round of a collective alone takes 140 and 300 us, but gloo's threads
# wait for cores that compute; comm.shard of examples/quickstart.toml is 21 ms a step in 2 processes, 56 ms in 4.
TRAINING = f"bandwidth {MEASURED}; latency from the measured step account of examples/quickstart.toml there"
GLOO = Link(name="gloo over loopback", bytes_per_s=1.8e9, latency_s=1.0e-3, source=TRAINING)
GLOO_SHARED_CORES = Link(
    name="gloo over loopback, more processes than cores", bytes_per_s=1.0e9, latency_s=1.2e-3, source=TRAINING
)

# Where the machine does not say: 2 GHz and 4 GiB a core are below what any current server or laptop has.
FALLBACK_HERTZ = 2.0e9
FALLBACK_BYTES_PER_CORE = 4 << 30


class CpuPeak(msgspec.Struct, frozen=True, kw_only=True):
    """Nominal fp32 rate of all cores together, and how it was reckoned."""

    flops_per_s: float
    source: str


def local_cluster(processes: int, visible: str | None = None) -> Cluster:
    """This machine's GPUs as one node; without any, `processes` equal shares of its processor.

    `visible` is CUDA_VISIBLE_DEVICES as the environment has it: only its entries count ("" hides every GPU).
    """
    gpus = local_gpus() if visible != "" else []
    if visible is not None:
        gpus = gpus[: len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])]
    if not gpus:
        return cpu_cluster(processes)
    name, memory_bytes = gpus[0]
    return gpu_cluster(match_gpu(name) or unknown_gpu(name, memory_bytes), len(gpus), memory_bytes)


def gpu_cluster(row: Node, devices: int, memory_bytes: float) -> Cluster:
    """One node of GPUs with the memory that the driver reports: more than the datasheet's GB, which mean GiB."""
    source = f"{row.device.source}; memory as nvidia-smi reports it"
    device = msgspec.structs.replace(row.device, memory_bytes=memory_bytes, source=source)
    return Cluster(device=device, devices_per_node=devices, intra=row.intra, inter=share_ports(row.inter, devices))


def local_gpus() -> list[tuple[str, float]]:
    """(name, memory in bytes) of every GPU that nvidia-smi lists; none where it is absent or finds no driver.

    Raises SettingError where it does not answer: a rank that took silence for "no GPU" would wait for its peers.
    """
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        reason = "did not answer in 20 s, so this machine's GPUs are not known"
        raise SettingError("nvidia-smi", reason, "CUDA_VISIBLE_DEVICES= to use none") from None
    except OSError:
        return []
    return parse_gpus(done.stdout) if done.returncode == 0 else []


def parse_gpus(listing: str) -> list[tuple[str, float]]:
    """(name, memory in bytes) of each line of nvidia-smi's answer: "NVIDIA H200, 143771 MiB"."""
    lines = (re.fullmatch(r"\s*(.+?),\s*(\d+) MiB\s*", line) for line in listing.splitlines())
    return [(line[1], float(line[2]) * 2**20) for line in lines if line]


def cpu_cluster(processes: int) -> Cluster:
    """`processes` devices that share this machine's cores, memory and bandwidth equally."""
    peak = cpu_flops_per_s()
    share = peak.flops_per_s / processes
    device = Device(
        name="cpu process",
        kind="cpu",
        memory_bytes=memory_bytes() / processes,
        memory_bytes_per_s=CPU_COPY_BYTES_PER_S / processes,
        # Without a bf16 matrix unit PyTorch converts and runs at the fp32 rate or below it.
        peak_bf16_flops_per_s=share,
        peak_fp32_flops_per_s=share,
        source=f"{peak.source}; over {processes} processes{BANDWIDTH}{MEASURED}",
    )
    link = GLOO if processes <= cores() else GLOO_SHARED_CORES
    return Cluster(device=device, devices_per_node=processes, intra=link, inter=link)


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0)) or 1
    except AttributeError:  # macOS has no affinity
        return os.cpu_count() or 1


def cpu_flops_per_s() -> CpuPeak:
    """Cores x frequency x fp32 lanes x 2 FLOPs x FMA units, from /proc/cpuinfo."""
    flags, hertz = set(re.findall(r"\w+", cpu_field("flags"))), cpu_hertz()
    if "avx512f" in flags:
        flops, what = 2 * 16 * 2, "AVX-512, 2 FMA units of 16 lanes"
    elif {"avx2", "fma"} <= flags:
        flops, what = 2 * 8 * 2, "AVX2, 2 FMA units of 8 lanes"
    else:
        flops, what = 2 * 4 * 2, "128-bit vectors, 2 units of 4 lanes"
    source = f"nominal: {cores()} cores x {hertz / 1e9:.2f} GHz x {flops} FLOPs ({what})"
    return CpuPeak(flops_per_s=cores() * hertz * flops, source=source)


def cpu_field(name: str) -> str:
    """The first processor's entry in /proc/cpuinfo; "" where there is none."""
    found = re.search(rf"^{re.escape(name)}\s*:\s*(.+)$", read_text("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else ""


def cpu_hertz() -> float:
    """Clock of the first core."""
    megahertz = re.fullmatch(r"\d+(\.\d+)?", cpu_field("cpu MHz"))
    return float(megahertz[0]) * 1e6 if megahertz and float(megahertz[0]) > 0 else FALLBACK_HERTZ


def processor_name() -> str:
    """The processor in words."""
    return cpu_field("model name") or platform.processor() or platform.machine()


def memory_bytes() -> float:
    """Main memory of this machine."""
    total = re.search(r"^MemTotal:\s*(\d+) kB", read_text("/proc/meminfo"), re.MULTILINE)
    if total:
        return float(total[1]) * 1024
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return float(FALLBACK_BYTES_PER_CORE * cores())


def read_text(path: str) -> str:
    """A small file's text; "" where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
