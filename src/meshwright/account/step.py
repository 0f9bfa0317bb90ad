"""The step account: where one rank's seconds of one step went."""

from typing import Literal, get_args

import msgspec

from meshwright.account.base import Account

Purpose = Literal["replica", "shard", "tensor", "context", "expert", "pipeline", "control"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

# Above this share of a step in `other`, the measurement itself is reported as poor.
CLOSING_TOLERANCE = 0.02

# What each bucket means, in the words that tables and reports print: short enough for a line of 100 columns.
MEANINGS: dict[str, str] = {
    "useful": "model FLOPs at the device's peak rate",
    "contention": "compute slowed by transfers that overlap it",
    "inefficiency": "the rest of compute: kernels below peak",
    "recompute": "forward redone for activation checkpointing",
    "optimizer": "gradient norm, clipping, parameter update",
    "comm.replica": "exposed gradient all-reduce between replicas",
    "comm.shard": "exposed gathers and reductions of shards",
    "comm.tensor": "exposed transfers of tensor parallelism",
    "comm.context": "exposed transfers of context parallelism",
    "comm.expert": "exposed transfers of expert parallelism",
    "comm.pipeline": "exposed transfers between pipeline stages",
    "comm.control": "exposed small syncs: norms, counts, stops",
    "imbalance": "waiting for a peer given more by the layout",
    "straggler": "waiting for a peer slower at equal work",
    "bubble": "pipeline idle, stages equal, transfers free",
    "input": "waiting for the next batch",
    "host": "device idle: its next work launched late",
    "checkpoint": "the step stalled by a save",
    "unseen": "in a compiled program that shows no parts",
    "other": "what is left",
}


class StepAccount(Account, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds per rank and step; the fields partition the step's wall time.

    `useful`, `contention` and `inefficiency` together are `compute`. comm.* is exposed transfer only.
    """

    useful: float = 0.0
    contention: float = 0.0
    inefficiency: float = 0.0
    recompute: float = 0.0
    optimizer: float = 0.0
    comm_replica: float = msgspec.field(default=0.0, name="comm.replica")
    comm_shard: float = msgspec.field(default=0.0, name="comm.shard")
    comm_tensor: float = msgspec.field(default=0.0, name="comm.tensor")
    comm_context: float = msgspec.field(default=0.0, name="comm.context")
    comm_expert: float = msgspec.field(default=0.0, name="comm.expert")
    comm_pipeline: float = msgspec.field(default=0.0, name="comm.pipeline")
    comm_control: float = msgspec.field(default=0.0, name="comm.control")
    imbalance: float = 0.0
    straggler: float = 0.0
    bubble: float = 0.0
    input: float = 0.0
    host: float = 0.0
    checkpoint: float = 0.0
    unseen: float = 0.0
    other: float = 0.0

    @property
    def compute(self) -> float:
        """Seconds in which the model's forward and backward kernels ran."""
        return self.useful + self.contention + self.inefficiency

    def closes(self, wall_s: float, tolerance: float = CLOSING_TOLERANCE) -> bool:
        """Whether the buckets sum to the wall time and `other` is small enough to trust the rest.

        `inefficiency` alone may be negative, when the kernels beat the datasheet.
        """
        sums = abs(self.total() - wall_s) <= 1e-6 * max(wall_s, 1e-9)
        sound = all(seconds >= -1e-9 for name, seconds in self.rows() if name != "inefficiency")
        return sums and sound and self.other <= tolerance * wall_s


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """One collective as one rank saw it, in seconds on that rank's clock.

    `ranks` are the participants, `index` counts the collectives of that purpose among them within the step, so
    (purpose, ranks, index) names the same collective on every participant. `exposed` holds the parts of
    [start_s, end_s] in which the rank did nothing else.
    """

    purpose: Purpose
    ranks: tuple[int, ...]
    index: int
    start_s: float
    end_s: float
    exposed: tuple[tuple[float, float], ...] = ()

    @property
    def key(self) -> tuple[str, tuple[int, ...], int]:
        """The collective's name, equal on all its participants."""
        return (self.purpose, self.ranks, self.index)

    def exposed_s(self) -> float:
        """Seconds of exposed transfer and waiting."""
        return sum(end - start for start, end in self.exposed)


class MeasuredStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step as one rank measured it, before its waits are known to be waits.

    In `account` every comm bucket still holds transfer and waiting together; account.waits separates them.
    `overlapped` is transfer hidden under compute, by purpose, seconds; it is never added to the account.
    Of a mixture whose experts are divided over ranks: `expert_rows`, tokens that this rank's experts were sent in each
    of the step's forward passes through a layer of them, in order; `expert_share`, their share of this rank's FLOPs.
    """

    step: int
    rank: int
    host: str
    start_s: float
    end_s: float
    account: StepAccount
    overlapped: dict[str, float] = {}
    transfers: tuple[Transfer, ...] = ()
    expert_rows: tuple[int, ...] = ()
    expert_share: float = 0.0

    @property
    def wall_s(self) -> float:
        """Seconds from step boundary to step boundary."""
        return self.end_s - self.start_s
