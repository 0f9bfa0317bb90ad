"""Known devices, as they are usually bought: each row with its source."""

import msgspec

from meshwright.spec.cluster import Device, DeviceKind, Link
from meshwright.spec.links import FABRICS, NETWORKS, Port

GIB = 2**30
# Of a device's memory, which datasheets give in GB and mean GiB, what the driver leaves to programs: torch tells of
# 79.15 to 79.33 GiB of 80 on A100 and H100, of 139.8 of 141 on H200 (measured on H200s, benchmarks/training_gpu.py).
LEFT_TO_PROGRAMS = 0.99


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A device as it is usually bought: with its links inside the node and the network's port out of it."""

    device: Device
    intra: Link
    inter: Port


def _row(
    name: str,
    *,
    memory: float,
    tb_per_s: float,
    bf16: float,
    fp32: float,
    fp16: float = 0.0,
    fp8: float = 0.0,
    fp4: float = 0.0,
    left: float = LEFT_TO_PROGRAMS,
    kind: DeviceKind = "cuda",
    intra: str,
    inter: str,
    source: str,
) -> Node:
    """A device's row in the units of datasheets: GB, TB/s and dense TFLOP/s. left: share of its memory that programs
    have."""
    device = Device(
        name=name,
        kind=kind,
        memory_bytes=memory * GIB * left,
        memory_bytes_per_s=tb_per_s * 1e12,
        peak_bf16_flops_per_s=bf16 * 1e12,
        peak_fp32_flops_per_s=fp32 * 1e12,
        peak_fp16_flops_per_s=fp16 * 1e12,
        peak_fp8_flops_per_s=fp8 * 1e12,
        peak_fp4_flops_per_s=fp4 * 1e12,
        source=source,
    )
    return Node(device=device, intra=FABRICS[intra], inter=NETWORKS[inter])


VOLTA = "NVIDIA V100 datasheet"
AMPERE = "NVIDIA A100 datasheet"
HOPPER = "NVIDIA H100 Tensor Core GPU datasheet"
HOPPER_HBM3E = "NVIDIA H200 Tensor Core GPU datasheet"
# TPUs multiply bf16 alone; XLA makes a product of fp32 numbers of several.
TPU_FP32 = "fp32: assumed a sixth of bf16, the six passes of XLA's highest precision"

# Peaks are dense: half of what a datasheet prints "with sparsity". fp32 is the rate outside the tensor cores: PyTorch
# keeps TF32 off by default. Cards whose NVLink bridges join pairs are given PCIe, which all cards of a node share.
ROWS = (
    _row(
        "v100-16",
        memory=16,
        tb_per_s=0.9,
        bf16=0,
        fp16=125,
        fp32=15.7,
        intra="nvlink-2",
        inter="infiniband-edr",
        source=f"{VOLTA}, SXM2 16GB, 2018; no bf16",
    ),
    _row(
        "v100-32",
        memory=32,
        tb_per_s=0.9,
        bf16=0,
        fp16=125,
        fp32=15.7,
        intra="nvlink-2",
        inter="infiniband-edr",
        source=f"{VOLTA}, SXM2 32GB, 2018; no bf16",
    ),
    _row(
        "v100-pcie-16",
        memory=16,
        tb_per_s=0.9,
        bf16=0,
        fp16=112,
        fp32=14,
        intra="pcie-3",
        inter="ethernet-100",
        source=f"{VOLTA}, PCIe 16GB, 2018; no bf16",
    ),
    _row(
        "v100-pcie-32",
        memory=32,
        tb_per_s=0.9,
        bf16=0,
        fp16=112,
        fp32=14,
        intra="pcie-3",
        inter="ethernet-100",
        source=f"{VOLTA}, PCIe 32GB, 2018; no bf16",
    ),
    _row(
        "a100-40",
        memory=40,
        tb_per_s=1.555,
        bf16=312,
        fp32=19.5,
        intra="nvlink-3",
        inter="infiniband-hdr",
        source=f"{AMPERE}, SXM4 40GB, 2020",
    ),
    _row(
        "a100-80",
        memory=80,
        tb_per_s=2.039,
        bf16=312,
        fp32=19.5,
        intra="nvlink-3",
        inter="infiniband-hdr",
        source=f"{AMPERE}, SXM4 80GB, 2021",
    ),
    _row(
        "a100-80-pcie",
        memory=80,
        tb_per_s=1.935,
        bf16=312,
        fp32=19.5,
        intra="pcie-4",
        inter="infiniband-hdr",
        source=f"{AMPERE}, PCIe 80GB, 2021",
    ),
    _row(
        "h100",
        memory=80,
        tb_per_s=3.35,
        bf16=989.4,
        fp32=66.9,
        fp8=1978.9,
        intra="nvlink-4",
        inter="infiniband-ndr",
        source=f"{HOPPER}, SXM5, 2023",
    ),
    _row(
        "h100-96",
        memory=96,
        tb_per_s=2.4,
        # Held to 500 W of 700: what limits products then is power, which goes with the square of their rate (assumed).
        bf16=836,
        fp32=56.5,
        fp8=1672,
        intra="nvlink-4",
        inter="infiniband-ndr",
        source="torchtitan, arXiv:2410.06511, 2024: 96 GB of HBM2e, a cap of 500 W; peaks reckoned from it",
    ),
    _row(
        "h100-pcie",
        memory=80,
        tb_per_s=2.0,
        bf16=756,
        fp32=51.2,
        fp8=1513,
        intra="pcie-5",
        inter="infiniband-ndr",
        source=f"{HOPPER}, PCIe, 2022",
    ),
    _row(
        "h100-nvl",
        memory=94,
        tb_per_s=3.9,
        bf16=835.5,
        fp32=60,
        fp8=1670.5,
        intra="pcie-5",
        inter="infiniband-ndr",
        source=f"{HOPPER}, NVL, 2024",
    ),
    _row(
        "h200",
        memory=141,
        tb_per_s=4.8,
        bf16=989.4,
        fp32=66.9,
        fp8=1978.9,
        intra="nvlink-4",
        inter="infiniband-ndr",
        source=f"{HOPPER_HBM3E}, SXM, 2024",
    ),
    _row(
        "h200-nvl",
        memory=141,
        tb_per_s=4.8,
        bf16=835.5,
        fp32=60,
        fp8=1670.5,
        intra="pcie-5",
        inter="infiniband-ndr",
        source=f"{HOPPER_HBM3E}, NVL, 2024",
    ),
    _row(
        "b200",
        memory=180,
        tb_per_s=8.0,
        bf16=2250,
        fp32=80,
        fp8=4500,
        fp4=9000,
        intra="nvlink-5",
        inter="infiniband-ndr",
        source="NVIDIA DGX B200 datasheet (1,440 GB and 64 TB/s over 8) and Blackwell architecture brief (HGX, "
        "1,000 W), 2024",
    ),
    _row(
        "gb200",
        memory=186,
        tb_per_s=8.0,
        bf16=2500,
        fp32=80,
        fp8=5000,
        fp4=10000,
        intra="nvlink-5",
        inter="infiniband-ndr",
        source="NVIDIA GB200 NVL72 datasheet, 2024 (13.4 TB, 576 TB/s and 360 PFLOP/s of sparse bf16 over 72)",
    ),
    _row(
        "b300",
        memory=270,
        tb_per_s=7.7,
        bf16=2250,
        fp32=75,
        fp8=4500,
        fp4=13125,
        intra="nvlink-5",
        inter="infiniband-xdr",
        source="NVIDIA HGX B300 specifications, 2025 (over 8: 2.1 TB, 36 PFLOP/s of sparse bf16, 105 of dense fp4)",
    ),
    _row(
        "gb300",
        memory=279,
        tb_per_s=8.0,
        bf16=2500,
        fp32=80,
        fp8=5000,
        fp4=15000,
        intra="nvlink-5",
        inter="infiniband-xdr",
        source="NVIDIA GB300 NVL72 datasheet, 2025 (20 TB, 576 TB/s and 360 PFLOP/s of sparse bf16 over 72)",
    ),
    _row(
        "l40s",
        memory=48,
        # Error correction lies in the same memory: nvidia-smi tells of 46,068 MiB.
        left=0.93,
        tb_per_s=0.864,
        bf16=362.05,
        fp32=91.6,
        fp8=733,
        intra="pcie-4",
        inter="ethernet-100",
        source="NVIDIA L40S datasheet, 2023",
    ),
    _row(
        "rtx4090",
        memory=24,
        tb_per_s=1.008,
        bf16=165.2,
        fp32=82.6,
        fp8=330.3,
        intra="pcie-4",
        inter="ethernet-100",
        source="NVIDIA Ada GPU architecture whitepaper, 2022 (bf16 and fp8 with fp32 accumulation)",
    ),
    _row(
        "mi300x",
        kind="rocm",
        memory=192,
        tb_per_s=5.3,
        bf16=1307.4,
        fp32=163.4,
        fp8=2614.9,
        intra="infinity-fabric-3",
        inter="infiniband-ndr",
        source="AMD Instinct MI300X datasheet, 2023",
    ),
    _row(
        "mi325x",
        kind="rocm",
        memory=256,
        tb_per_s=6.0,
        bf16=1307.4,
        fp32=163.4,
        fp8=2614.9,
        intra="infinity-fabric-3",
        inter="infiniband-ndr",
        source="AMD Instinct MI325X datasheet, 2024",
    ),
    _row(
        "mi355x",
        kind="rocm",
        memory=288,
        tb_per_s=8.0,
        bf16=2516.6,
        fp32=157.3,
        fp8=5033.2,
        fp4=10066.3,
        intra="infinity-fabric-4",
        inter="infiniband-ndr",
        source="AMD Instinct MI355X datasheet, 2025",
    ),
    _row(
        "tpu-v5e",
        kind="tpu",
        memory=16,
        tb_per_s=0.819,
        bf16=197,
        fp32=197 / 6,
        intra="ici-v5e",
        inter="dcn-v5e",
        source=f"Google Cloud TPU v5e documentation, 2025; {TPU_FP32}",
    ),
    _row(
        "tpu-v5p",
        kind="tpu",
        memory=95,
        tb_per_s=2.765,
        bf16=459,
        fp32=459 / 6,
        fp8=459,
        intra="ici-v5p",
        inter="dcn-v5p",
        source=f"Google Cloud TPU v5p documentation, 2025; {TPU_FP32}",
    ),
    _row(
        "tpu-v6e",
        kind="tpu",
        memory=32,
        tb_per_s=1.638,
        bf16=918,
        fp32=918 / 6,
        intra="ici-v6e",
        inter="dcn-v6e",
        source=f"Google Cloud TPU v6e documentation, 2025; {TPU_FP32}",
    ),
)
NODES: dict[str, Node] = {row.device.name: row for row in ROWS}
