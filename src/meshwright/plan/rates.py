"""How much of a device's datasheet rates real kernels reach. Every constant of the step model is in this file.

GPU figures are read off the measured steps of notes on GPU baselines (H200, torch 2.11, 2026-11-22): one step of
llama3-8b, 8,192 tokens on each of 2 GPUs, 855 ms, whose kernel timeline says how long each kind of work took. They are
shares of the datasheet, so that they carry over to other devices; how well they do there is not measured yet.
CPU figures: measured on a 2-core x86 virtual machine, torch 2.13, 2026-11-22. `meshwright calibrate` measures those of
a machine, which then stand in the place of these.
"""

import msgspec

from meshwright.spec import Cluster, Collective, Device, Rates

# Between a device and its host's memory: PCI Express 5.0 with 16 lanes carries 63 GB/s each way, of which copies are
# taken to reach four fifths.
HOST_LINK_BYTES_PER_S = 50e9
# The host's cores on parameters that are offloaded: 10 passes (7 of AdamW, 3 of the norm and clipping) over 0.75e9
# numbers of 4 bytes in about 2.4 s of a 3.18 s step, a rank: llama-1b-untied, shard 2, on two H200s whose host has 32
# cores for both (torch 2.11, 2026-11-23). Ranks with fewer cores will have less.
HOST_UPDATE_BYTES_PER_S = 12.5e9
ALIKE: dict[Collective, float] = {
    "all_reduce": 1.0,
    "all_gather": 1.0,
    "reduce_scatter": 1.0,
    "all_to_all": 1.0,
    "send": 1.0,
}

GPU = Rates(
    # 6 x 7.50e9 parameters x 8,192 tokens in 557 ms: 662 TFLOP/s of 989.4, or 0.67; without these products' edges
    # (4.3% by the next line) 0.70.
    matmul=0.70,
    # Cubes of 4096 and 8192 there: 775 and 799 TFLOP/s.
    matmul_edge=87.0,
    # 17.6 and 35.2 TFLOP (causal half) in 35 and 97 ms (cuDNN): 503 and 363 TFLOP/s of 989.4.
    # FlashAttention 2 reaches 35% of this device forward (arXiv:2407.08608); backward as much less as cuDNN does.
    attention={"cudnn": (0.51, 0.37), "flash": (0.32, 0.22), "flash-1": (0.20, 0.15)},
    # Batched products of a head's width at these sizes, as read off published steps (docs/predicting.md): half of plain
    # ones.
    scores=0.35,
    # 115 GB by fused_elements in 45 ms (compiled): 2.55 TB/s of 4.8.
    elementwise=0.53,
    # Assumed: operators that do nothing else are a little slower than a copy (the next line).
    eager=0.75,
    # Device copy 4.26 TB/s of 4.8: the compiled loss is a few passes over large tensors. Assumed to equal a copy.
    loss=0.89,
    # `inefficiency` of examples/mixture.toml on 2 H200s (torch 2.11, 2026-11-23): 172 ms with shard 2, 147 with expert
    # 2 as well, where this gives 167 and 158. What is eager around the products, routing and SwiGLU, is in it.
    grouped=0.6,
    # 8.03e9 parameters x (2 + 4) bytes in 26 ms: 1.85 TB/s of 4.8.
    copy_in=0.39,
    # 2 gathers x 8.03e9 parameters x (2 + 2) bytes in 17 ms: 3.8 TB/s of 4.8.
    copy_out=0.79,
    # 4.02e9 parameters a rank x 28 bytes in 33 ms (fused AdamW): 3.4 TB/s of 4.8.
    update=0.71,
    # 1.50e9 gradients x 12 bytes in 5.5 ms: 3.3 TB/s of 4.8. That is the optimizer bucket of the one-GPU run of
    # benchmarks/training_gpu.py, 17.8 ms, less the update at the rate above. (torch's clip_grad_norm_ takes 4 times
    # as long: 57 ms in the notes' step.)
    clip=0.68,
    # Bus bandwidth at 1 GiB on 4 H200s: 353, 325 and 320 GB/s of NVLink's 450. The last two are assumed to be as fast
    # as a gather.
    links={"all_reduce": 0.78, "all_gather": 0.72, "reduce_scatter": 0.71, "all_to_all": 0.72, "send": 0.72},
    # A link's own latency is all that is known of it.
    latencies=ALIKE,
    overlaps=True,
    # Kernels beside a collective are slowed 1.1 to 1.3 times in published measurements; the middle of it.
    contention=0.2,
    # As measured on the CPU below: servers of GPUs are not slower, and a compiled block launches less.
    block_host_s=0.75e-3,
    # Published steps of small models on A100s, whose devices wait for their hosts (docs/predicting.md).
    eager_host_s=2.35e-3,
    group_host_s=0.8e-3,
    # Compiled, a block's placements are settled before it runs. Assumed: none.
    tensor_host_s=0.0,
    # `host` of the two runs of examples/mixture.toml above, profiled: 54 and 117 ms a step of 12 blocks, 2 microbatches
    # and 2 passes. Assumed to be the same for larger blocks, under which the host might run ahead.
    routed_wait_s=1.1e-3,
    sent_wait_s=1.3e-3,
    # Published steps of small pipelines: eager trainers synchronise where they hand a microbatch on.
    handed_wait_s=1e-3,
    host_link_bytes_per_s=HOST_LINK_BYTES_PER_S,
    host_update_bytes_per_s=HOST_UPDATE_BYTES_PER_S,
    # No late launch in any profiled step of benchmarks/training_gpu.py: the host runs ahead of compiled blocks.
    step_s=0.0,
)

# What differs on NVIDIA's Ampere, read off published steps of A100s (docs/predicting.md).
AMPERE = msgspec.structs.replace(
    GPU,
    # 0.80 of 312 TFLOP/s is what the largest products of those runs come to.
    matmul=0.86,
    matmul_edge=150.0,
    attention={"cudnn": (0.50, 0.36), "flash": (0.50, 0.36), "flash-1": (0.35, 0.25)},
)

CPU = Rates(
    # 192 to 200 GFLOP/s of a nominal 332, in 1 and in 2 processes; inside a block 179.
    matmul=0.56,
    # Not measured: the rates of the cube and of a small model's block are close.
    matmul_edge=0.0,
    # A block's attention, forward and backward, 14.4 ms for 0.81 GFLOP (causal half): 56 GFLOP/s of 332. Not split.
    attention={"cudnn": (0.17, 0.17), "flash": (0.17, 0.17), "flash-1": (0.17, 0.17)},
    # A block's scores are computed by the same kernel.
    scores=0.17,
    # A block's rest, 11.5 ms for 109 MB by fused_elements: 9.5 GB/s of a copy's 32; 236 by eager_elements.
    elementwise=0.30,
    eager=0.65,
    loss=0.30,
    # A loop over experts of plain products.
    grouped=1.0,
    # Plain copies are what the row's bandwidth was measured with.
    copy_in=1.0,
    copy_out=1.0,
    # Assumed: fused AdamW and foreach operators stream as well as a copy.
    update=1.0,
    clip=1.0,
    # The link rows of plan/machine.py are those of all-reduce; the other two in the same run: 1.36 and 0.83 of
    # 1.83 GB/s in 2 processes, 1.23 and 0.59 of 1.03 in 4.
    # Assumed: exchanges as a reduction, whose parts go to each rank as theirs do; sends at the link's rate.
    links={"all_reduce": 1.0, "all_gather": 0.9, "reduce_scatter": 0.5, "all_to_all": 0.5, "send": 1.0},
    latencies=ALIKE,
    # gloo blocks the training thread.
    overlaps=False,
    contention=0.0,
    # Between what the measured accounts of two jobs in training say: 24 ms of `host` in a step of
    # examples/first-run.toml (8 blocks and 16 groups run), 21 ms in one of examples/quickstart.toml (4 and 6).
    block_host_s=1.1e-3,
    eager_host_s=1.1e-3,
    group_host_s=1.1e-3,
    # `host` of a step of a model of 2 blocks, the two ends of which count as a third: 33 ms in 2 processes along
    # tensor, 8 ms in one (measured accounts, 2026-11-22; DTensor works out in Python where everything goes).
    tensor_host_s=8e-3,
    # Every launch counts here, in a block's.
    routed_wait_s=0.0,
    sent_wait_s=0.0,
    handed_wait_s=0.0,
    host_link_bytes_per_s=HOST_LINK_BYTES_PER_S,
    host_update_bytes_per_s=HOST_UPDATE_BYTES_PER_S,
    # The optimizer's and the loop's own Python, assumed.
    step_s=4e-3,
)


def rates_of(cluster: Cluster) -> Rates:
    """The cluster's own rates, as calibrate measured them; else the built-in ones of its device."""
    return cluster.rates or built_in_rates(cluster.device)


def built_in_rates(device: Device) -> Rates:
    """The shares that hold for a device that nobody has calibrated."""
    if not device.is_accelerator:
        return CPU
    return AMPERE if device.name.startswith("a100") else GPU
