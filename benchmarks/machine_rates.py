"""What this machine's processor reaches: the figures that plan/machine.py and plan/rates.py hold for CPU clusters.

    python benchmarks/machine_rates.py

Prints, for 1, 2 and 4 processes that share the cores: matrix products, copies and gloo collectives; for one process
also the host's time for a block and for FSDP around it, and a decoder block beside its matrix products alone.
"""

import os
import platform
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from meshwright.models import build_model, token_loss
from meshwright.parallel.shard import apply_shard
from meshwright.plan.machine import cpu_flops_per_s, processor_name
from meshwright.spec import Layout, ModelSpec


def measure_s(work: Callable[[], object], repeats: int = 15) -> float:
    """Shortest seconds of `work`, after one run to warm up: what else runs on the machine can only lengthen one."""
    work()
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure_matmul_flops_per_s(rows: int, inner: int, columns: int) -> float:
    """fp32 matrix product of activations (rows x inner) with a weight."""
    a, b = torch.randn(rows, inner), torch.randn(columns, inner)
    return 2 * rows * inner * columns / measure_s(lambda: F.linear(a, b))


def measure_copy_bytes_per_s(size_bytes: int = 64 << 20) -> float:
    """Bytes read and written a second by a copy larger than the caches."""
    source = torch.ones(size_bytes // 4)
    target = torch.empty_like(source)
    return 2 * size_bytes / measure_s(lambda: target.copy_(source))


def measure_collectives(rank: int, ranks: int) -> None:
    """Seconds of each gloo collective at two sizes, and the latency and bandwidth of a ring that they amount to."""
    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        times: list[tuple[int, float]] = []
        for size_bytes in (4 << 10, 1 << 20, 16 << 20):
            whole = torch.ones(size_bytes // 4)
            share = torch.ones(size_bytes // 4 // ranks)
            work = {
                "all_reduce": lambda whole=whole: dist.all_reduce(whole),
                "all_gather": lambda whole=whole, share=share: dist.all_gather_into_tensor(whole, share),
                "reduce_scatter": lambda whole=whole, share=share: dist.reduce_scatter_tensor(share, whole),
            }[name]
            dist.barrier()
            times.append((size_bytes, measure_s(work, 25)))
        rounds = (ranks - 1) * (2 if name == "all_reduce" else 1)
        latency_s = times[0][1] / rounds
        link_bytes_per_s = rounds / ranks * (times[2][0] - times[0][0]) / (times[2][1] - times[0][1])
        if rank == 0:
            shown = ", ".join(f"{size >> 10} KiB {seconds * 1e3:.2f} ms" for size, seconds in times)
            print(f"  {name}: {shown}; ring {link_bytes_per_s / 1e9:.2f} GB/s, {latency_s * 1e6:.0f} us a round")


def measure_host(layers: int = 6) -> tuple[float, float]:
    """Host seconds a microbatch of one block, and of one FSDP group around it: a model too small to compute."""
    spec = ModelSpec(layers=layers, d_model=32, heads=2, kv_heads=1, head_dim=16, feed_forward=64, vocabulary=64)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    seconds: list[float] = []
    for sharded in (False, True):
        model = build_model(spec, device="meta")
        if sharded:
            mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replica", "shard"))
            units, tail = [*model.blocks.values()], [part for part in (model.norm, model.head) if part is not None]
            apply_shard(model, mesh, Layout(precision="fp32"), units, tail)
        model.to_empty(device="cpu")
        seconds.append(measure_s(lambda model=model: token_loss(model(tokens), tokens).backward()))
    plain_s, sharded_s = seconds
    return plain_s / layers, (sharded_s - plain_s) / (layers + 2)


def measure_block(rows: int = 2048, d: int = 256, f: int = 768, sequence: int = 256) -> tuple[float, float, float]:
    """Forward and backward of a decoder block: all of it, its matrix products alone, and its attention alone."""
    heads, e = d // 64, 64
    weights = [torch.randn(shape, requires_grad=True) for shape in ((4 * d, d), (2 * f, d), (d, f), (d, d))]
    qkv_w, gate_up_w, down_w, out_w = weights
    x = torch.randn(rows, d, requires_grad=True)
    scale = torch.ones(d, requires_grad=True)
    mid, wide = torch.randn(rows, d, requires_grad=True), torch.randn(rows, f, requires_grad=True)
    q, k, v = (torch.randn(rows // sequence, heads, sequence, e, requires_grad=True) for _ in range(3))
    cosine = torch.randn(sequence, e)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def rotate(t: torch.Tensor) -> torch.Tensor:
        a, b = t.chunk(2, -1)
        return t * cosine + torch.cat((-b, a), -1) * cosine

    def block() -> None:
        projected = F.linear(F.rms_norm(x, (d,), scale), qkv_w[: 3 * d])
        q, k, v = projected.view(-1, sequence, 3, heads, e).permute(2, 0, 3, 1, 4)
        mixed = attention(rotate(q), rotate(k), v).transpose(1, 2).reshape(rows, d)
        h = x + F.linear(mixed, out_w)
        gate, up = F.linear(F.rms_norm(h, (d,), scale), gate_up_w).chunk(2, -1)
        (h + F.linear(F.silu(gate) * up, down_w)).sum().backward()

    def products() -> None:
        outputs = (F.linear(x, qkv_w[: 3 * d]), F.linear(mid, out_w), F.linear(x, gate_up_w), F.linear(wide, down_w))
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])

    attention_s = measure_s(lambda: attention(q, k, v).sum().backward())
    return measure_s(block), measure_s(products), attention_s


def rates_of(rank: int, ranks: int, store: str) -> None:
    """What one of `ranks` processes reaches while all run; rank 0 prints."""
    cores = os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // ranks))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    dist.barrier()
    small, large = measure_matmul_flops_per_s(2048, 256, 768), measure_matmul_flops_per_s(2048, 2048, 2048)
    copy = measure_copy_bytes_per_s()
    dist.barrier()
    if rank == 0:
        print(
            f"{ranks} processes of {torch.get_num_threads()} threads, each: matmul 2048x256x768 {small / 1e9:.0f} "
            f"GFLOP/s, 2048^3 {large / 1e9:.0f} GFLOP/s, copy {copy / 1e9:.1f} GB/s"
        )
    if ranks > 1:
        measure_collectives(rank, ranks)
    else:
        block_s, group_s = measure_host()
        print(f"  host: a block {block_s * 1e3:.2f} ms, an FSDP group {group_s * 1e3:.2f} ms, forward and backward")
        whole_s, products_s, attention_s = measure_block()
        print(
            f"  block of 2048 tokens, 256 wide, forward and backward: {whole_s * 1e3:.1f} ms, of it matrix products "
            f"{products_s * 1e3:.1f} ms, attention {attention_s * 1e3:.1f} ms"
        )
    dist.destroy_process_group()


def main() -> None:
    """Measure with 1, 2 and 4 processes, one after another."""
    nominal = cpu_flops_per_s()
    print(f"{processor_name()}, {os.cpu_count()} cores, {platform.platform()}, torch {torch.__version__}")
    print(f"nominal {nominal.flops_per_s / 1e9:.0f} GFLOP/s: {nominal.source}")
    for ranks in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            workers = [
                get_context("fork").Process(target=rates_of, args=(rank, ranks, f"{folder}/store"))
                for rank in range(ranks)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()


if __name__ == "__main__":
    main()
