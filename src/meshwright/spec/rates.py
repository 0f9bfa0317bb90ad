"""How much of a device's datasheet rates real kernels and transfers reach: numbers that a cluster may carry."""

from typing import Literal, get_args

import msgspec

from meshwright.spec.errors import SettingError
from meshwright.spec.numbers import check_range
from meshwright.spec.trainer import AttentionKernel

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]

# Of a share: far below and above what any kernel reaches of a rate that is meant for it.
LEAST_SHARE, MOST_SHARE = 1e-6, 1e3
# Of bytes a second.
MOST_BYTES_PER_S = 1e21
MOST_SECONDS = 1e3
# A product's edge is a number of rows or columns, and slowing a share of time; both may be none.
MOST_EDGE = 1e6


# Repeats of a figure that lie so far apart, over their median, were disturbed.
UNSTEADY = 0.5


class Rates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shares of a device's peak FLOP rate, memory bandwidth and link bandwidth; and seconds that the host takes.

    matmul: of the peak, what a matrix product would reach without edges; one of M x K x N takes
        1 + matmul_edge (1/M + 1/K + 1/N) times as long.
    attention: of the peak, forward and backward, on the causal half of the products alone, by kernel. scores: of the
        peak, products of attention that has its scores in memory, all of them.
    elementwise: norms, rotations, activation functions and residuals; eager: the same where blocks are not compiled.
    loss: cross entropy over the vocabulary.
    grouped: of what a plain matrix product reaches, what experts' products do, several matrices in one.
    copy_in, copy_out: FSDP's copies before a reduction and after a gather.
    update, clip: the optimizer's pass over states, and the gradient norm with the rescaling of gradients.
    links: of the link's bandwidth, what a large collective moves along a ring. latencies: of the link's latency, what
        a round of each takes.
    overlaps: whether transfers run beside compute. contention: of the seconds that they do, what compute takes longer.
    block_host_s, group_host_s: what Python and the dispatcher take for one block, and for FSDP's hooks around one
        group, forward and backward of one microbatch. eager_host_s: for a block that is not compiled. tensor_host_s:
        what the tensor axis adds for one block.
    routed_wait_s, sent_wait_s: what a device waits for its host in either pass of a mixture's block, and more where
        tokens are sent to other ranks. handed_wait_s: in a pipeline, what the device waits in either pass of a
        microbatch of an eager trainer.
    host_link_bytes_per_s: between a device and its host's memory. host_update_bytes_per_s: of a rank's cores on states
        that are offloaded.
    step_s: idle device per step outside the model (logging, syncs).
    """

    matmul: float
    matmul_edge: float
    attention: dict[AttentionKernel, tuple[float, float]]
    scores: float
    elementwise: float
    eager: float
    loss: float
    grouped: float
    copy_in: float
    copy_out: float
    update: float
    clip: float
    links: dict[Collective, float]
    latencies: dict[Collective, float]
    overlaps: bool
    contention: float
    block_host_s: float
    eager_host_s: float
    group_host_s: float
    tensor_host_s: float
    routed_wait_s: float
    sent_wait_s: float
    handed_wait_s: float
    host_link_bytes_per_s: float
    host_update_bytes_per_s: float
    step_s: float


class Measured(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When and with what a cluster was calibrated, and how sure its figures are.

    date: YYYY-MM-DD. device: as its driver or system names it. processes: how many measured together. spread: of each
    figure, what lies between the 10th and the 90th hundredth of its repeats, over their median, in its least steady
    size. misfit: the largest relative distance of a measured size from what the plan reckons of it.
    """

    date: str
    device: str
    processes: int
    torch: str
    cuda: str = ""
    nccl: str = ""
    spread: dict[str, float] = {}
    misfit: dict[str, float] = {}

    @property
    def is_steady(self) -> bool:
        """Whether most figures' repeats lay near each other, as on a machine that does nothing else."""
        spreads = sorted(self.spread.values())
        return not spreads or spreads[len(spreads) // 2] < UNSTEADY


def check_rates(rates: Rates) -> None:
    """Raise SettingError for shares and times that no machine has: what is divided by them must stay finite."""
    for name in rates.__struct_fields__:
        value, (low, high) = getattr(rates, name), range_of(name)
        if isinstance(value, float):
            check_range(f"cluster.rates.{name}", value, low, high)
    for kind in get_args(Collective):
        for name in ("links", "latencies"):
            shares, setting = getattr(rates, name), f"cluster.rates.{name}.{kind}"
            if kind not in shares:
                raise SettingError(setting, "is missing", f"{setting} = 1.0")
            check_range(setting, shares[kind], *range_of(name))
    if "cudnn" not in rates.attention:
        raise SettingError("cluster.rates.attention.cudnn", "is missing", "cluster.rates.attention.cudnn = [0.5, 0.4]")
    for kernel, shares in rates.attention.items():
        for share in shares:
            check_range(f"cluster.rates.attention.{kernel}", share, *range_of("attention"))


def range_of(name: str) -> tuple[float, float]:
    """What a figure of this name may be."""
    if name in ("matmul_edge", "contention"):
        return 0.0, MOST_EDGE
    if name == "latencies":
        return 0.0, MOST_SHARE
    if name.endswith("_bytes_per_s"):
        return 1.0, MOST_BYTES_PER_S
    return (0.0, MOST_SECONDS) if name.endswith("_s") else (LEAST_SHARE, MOST_SHARE)
