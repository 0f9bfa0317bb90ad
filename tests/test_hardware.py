"""Every row of the hardware table is reached, sourced and sound; this machine is described without crashing."""

import re
import subprocess

import pytest

from meshwright.plan import local_cluster, machine
from meshwright.spec import SettingError
from meshwright.spec.devices import NODES
from meshwright.spec.hardware import GPU_WORDS, cluster_of, match_gpu, unknown_gpu

# Datasheet, dense: memory GB, memory TB/s, 16 bits TFLOP/s, fp32 TFLOP/s, fp8 TFLOP/s, link inside a node GB/s one way.
DATASHEET = {
    "v100-16": (16, 0.9, 125, 15.7, 0, 150),
    "v100-32": (32, 0.9, 125, 15.7, 0, 150),
    "v100-pcie-16": (16, 0.9, 112, 14, 0, 15.75),
    "v100-pcie-32": (32, 0.9, 112, 14, 0, 15.75),
    "a100-40": (40, 1.555, 312, 19.5, 0, 300),
    "a100-80": (80, 2.039, 312, 19.5, 0, 300),
    "a100-80-pcie": (80, 1.935, 312, 19.5, 0, 31.5),
    "h100": (80, 3.35, 989.4, 66.9, 1978.9, 450),
    "h100-pcie": (80, 2.0, 756, 51.2, 1513, 63),
    "h100-96": (96, 2.4, 836, 56.5, 1672, 450),
    "h100-nvl": (94, 3.9, 835.5, 60, 1670.5, 63),
    "h200": (141, 4.8, 989.4, 66.9, 1978.9, 450),
    "h200-nvl": (141, 4.8, 835.5, 60, 1670.5, 63),
    "b200": (180, 8.0, 2250, 80, 4500, 900),
    "gb200": (186, 8.0, 2500, 80, 5000, 900),
    "b300": (270, 7.7, 2250, 75, 4500, 900),
    "gb300": (279, 8.0, 2500, 80, 5000, 900),
    "l40s": (48, 0.864, 362.05, 91.6, 733, 31.5),
    "rtx4090": (24, 1.008, 165.2, 82.6, 330.3, 31.5),
    "mi300x": (192, 5.3, 1307.4, 163.4, 2614.9, 448),
    "mi325x": (256, 6.0, 1307.4, 163.4, 2614.9, 448),
    "mi355x": (288, 8.0, 2516.6, 157.3, 5033.2, 537.6),
    "tpu-v5e": (16, 0.819, 197, 32.8, 0, 100),
    "tpu-v5p": (95, 2.765, 459, 76.5, 459, 200),
    "tpu-v6e": (32, 1.638, 918, 153, 0, 200),
}
KINDS = {"mi": "rocm", "tpu": "tpu"}
# As nvidia-smi, PyTorch on ROCm and JAX print them.
PRINTED = {
    "Tesla V100-SXM2-16GB": "v100-16",
    "Tesla V100-SXM2-32GB": "v100-32",
    "Tesla V100-PCIE-16GB": "v100-pcie-16",
    "Tesla V100-PCIE-32GB": "v100-pcie-32",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100 80GB PCIe": "a100-80-pcie",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 96GB HBM2e": "h100-96",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA H200 NVL": "h200-nvl",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "NVIDIA B300 SXM6 AC": "b300",
    "NVIDIA GB300": "gb300",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "AMD Instinct MI300X": "mi300x",
    "AMD Instinct MI325X": "mi325x",
    "AMD Instinct MI355X": "mi355x",
    "TPU v5 lite": "tpu-v5e",
    "TPU v5p": "tpu-v5p",
    "TPU v6 lite": "tpu-v6e",
}


def test_every_row_is_in_the_datasheets_table() -> None:
    assert NODES.keys() == DATASHEET.keys() == set(PRINTED.values())
    assert {row for _, row in GPU_WORDS if row} == NODES.keys()


@pytest.mark.parametrize("name", NODES)
def test_row(name: str) -> None:
    cluster = cluster_of(f"2x8x{name}")
    device, figures = cluster.device, DATASHEET[name]
    kind = next((kind for start, kind in KINDS.items() if name.startswith(start)), "cuda")
    assert (cluster.devices, device.name, device.kind) == (16, name, kind)
    # GB of memory are GiB, less what the driver keeps, and error correction where it takes some.
    assert device.memory_bytes == pytest.approx(figures[0] * 2**30 * (0.93 if name == "l40s" else 0.99))
    assert device.memory_bytes_per_s == pytest.approx(figures[1] * 1e12)
    assert device.peak_flops_per_s("bf16") == pytest.approx(figures[2] * 1e12)
    assert device.peak_flops_per_s("fp32") == pytest.approx(figures[3] * 1e12, rel=2e-3)
    assert device.peak_flops_per_s("fp8") == pytest.approx(figures[4] * 1e12)
    # One of them at most, and fp4 is faster than fp8 where there is any.
    assert not (device.peak_bf16_flops_per_s and device.peak_fp16_flops_per_s)
    assert device.peak_fp4_flops_per_s == 0 or device.peak_fp4_flops_per_s >= 1.9 * device.peak_fp8_flops_per_s
    assert cluster.intra.bytes_per_s == pytest.approx(figures[5] * 1e9)
    assert cluster.inter.bytes_per_s < cluster.intra.bytes_per_s
    assert 0 < cluster.intra.latency_s < cluster.inter.latency_s
    for source in (device.source, cluster.intra.source, cluster.inter.source):
        assert len(source) > 10
    assert re.search(r"20[12]\d", device.source)


@pytest.mark.parametrize(("printed", "row"), PRINTED.items())
def test_names_of_the_driver(printed: str, row: str) -> None:
    node = match_gpu(printed)
    assert node is not None
    assert node.device.name == row


@pytest.mark.parametrize(
    "printed",
    ["NVIDIA GH200 480GB", "NVIDIA A100-PCIE-40GB", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla T4", "NVIDIA L40"],
)
def test_a_gpu_that_is_not_in_the_table_is_not_taken_for_one_that_is(printed: str) -> None:
    assert match_gpu(printed) is None
    device = unknown_gpu(printed, 16e9).device
    assert (device.memory_bytes, device.peak_flops_per_s("bf16")) == (16e9, 0)


def test_an_unknown_name_says_the_nearest() -> None:
    with pytest.raises(SettingError) as error:
        cluster_of("8xh10")
    assert error.value.nearest == "h100"


def fake_smi(monkeypatch: pytest.MonkeyPatch, listing: str, code: int = 0) -> None:
    def run(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], code, listing, "")

    monkeypatch.setattr(machine.subprocess, "run", run)


def test_gpus_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(monkeypatch, "NVIDIA H200, 143771 MiB\nNVIDIA H200, 143771 MiB\n")
    assert local_cluster(4).label() == "2 x h200"
    assert local_cluster(4).device.memory_bytes == 143771 * 2**20  # more than the datasheet's 141 GB
    assert local_cluster(4, visible="1").label() == "1 x h200"
    assert local_cluster(4, visible="").device.kind == "cpu"
    assert local_cluster(4, visible="-1").device.kind == "cpu"


def test_an_unknown_gpu_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(monkeypatch, "Tesla T4, 15360 MiB\n")
    device = local_cluster(1).device
    assert (device.name, device.memory_bytes, device.peak_bf16_flops_per_s) == ("Tesla T4", 15360 * 2**20, 0)


@pytest.mark.parametrize(("listing", "code"), [("", 0), ("NVIDIA-SMI has failed\n", 9), ("[N/A], [N/A]\n", 0)])
def test_a_driver_without_an_answer_is_no_gpu(monkeypatch: pytest.MonkeyPatch, listing: str, code: int) -> None:
    fake_smi(monkeypatch, listing, code)
    assert local_cluster(1).device.kind == "cpu"


def test_processes_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(monkeypatch, "")
    one, four = local_cluster(1), local_cluster(4)
    assert (one.devices, four.devices) == (1, 4)
    for figure in ("memory_bytes", "memory_bytes_per_s", "peak_fp32_flops_per_s"):
        assert getattr(one.device, figure) == pytest.approx(4 * getattr(four.device, figure))
    assert "measured on" in four.intra.source


def test_more_processes_than_cores_are_slower_to_pass_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(monkeypatch, "")
    monkeypatch.setattr(machine, "cores", lambda: 2)
    assert local_cluster(2).intra == machine.GLOO
    assert local_cluster(3).intra == machine.GLOO_SHARED_CORES


@pytest.mark.parametrize(
    ("flags", "flops"), [("fpu avx2 fma avx512f", 64), ("fpu avx2 fma", 32), ("fpu avx2", 16), ("", 16)]
)
def test_nominal_rate(monkeypatch: pytest.MonkeyPatch, flags: str, flops: int) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(machine, "read_text", lambda path: f"flags\t\t: {flags}\ncpu MHz\t\t: 3000.000\n")
    assert machine.cpu_flops_per_s().flops_per_s == 4 * 3e9 * flops


def test_a_machine_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(monkeypatch, "")
    monkeypatch.setattr(machine, "read_text", lambda path: "")
    device = local_cluster(2).device
    assert device.memory_bytes > 0
    assert device.peak_fp32_flops_per_s > 0
