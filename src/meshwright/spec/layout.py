"""How a job is spread over ranks."""

from typing import Literal, get_args

import msgspec

from meshwright.spec.errors import SettingError
from meshwright.spec.model import ModelSpec
from meshwright.spec.numbers import divisors

Axis = Literal["pipeline", "replica", "shard", "context", "tensor"]
# The axes whose sizes multiply to the world, outermost first by default. `expert` is not among them: it reuses ranks.
AXES: tuple[Axis, ...] = get_args(Axis)

Precision = Literal["fp32", "bf16", "fp8"]
Recompute = Literal["none", "selective", "full"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv", "dualpipev"]
ContextForm = Literal["ring", "all-to-all"]
Offload = Literal["none", "optimizer", "parameters"]


class Layout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Axis sizes, their order over the links, and what a rank does with its share.

    microbatch: sequences that one rank runs through the model at once.
    recompute: what of the forward pass is not kept for the backward pass but computed again: "none" of it;
        "selective", all but the results of matrix products, attention and transfers; "full", all inside a block;
        or a number n, all inside each of the first n blocks.
    expert: ranks that divide a mixture's experts. They are those of shard x context x tensor once more, neighbours
        first, and what they leave of those divides each expert's matrices.
    async_tensor: cut the tensor axis's transfers up to run beside the matrix products that need them (GPUs only).
    zero: what a rank of `shard` x `context` holds whole, and when (docs/layouts.md has the bytes):
        3 parameters only while a block runs; 2 parameters from forward to backward of a microbatch;
        1 parameters and gradients through all microbatches of a step. Optimizer states are always split.
        Of a mixture's experts, the same for a rank of those that share them; what none shares is always whole.
    schedule: the order in which a rank of the `pipeline` axis runs its stages' passes (spec/schedule.py).
    stages_per_rank: stages that each of them holds; 0: as few as the schedule works with.
    stage_layers: blocks of each stage, first to last; (): balanced by what they and both ends cost.
    context_form: how ranks of the `context` axis attend to each other's tokens: keys and values passed around a
        ring, or heads exchanged for tokens, all to all.
    offload: what lies in the host's memory while the device does not need it: "optimizer", the optimizer's states; or
        "parameters", with their gradients and states, updated there by its cores.
    precision: of the model's matrix products and of parameter transfers; parameters, gradient
        reductions and optimizer states are fp32 in each. "fp8": of the blocks' products alone, and the rest as in
        bf16; it can be planned, and not yet trained.
    """

    pipeline: int = 1
    replica: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    order: tuple[Axis, ...] = AXES
    microbatch: int = 1
    zero: Literal[1, 2, 3] = 3
    recompute: Recompute | int = "none"
    async_tensor: bool = False
    schedule: Schedule = "1f1b"
    stages_per_rank: int = 0
    stage_layers: tuple[int, ...] = ()
    context_form: ContextForm = "ring"
    offload: Offload = "none"
    precision: Precision = "bf16"

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pipeline * self.replica * self.shard * self.context * self.tensor

    @property
    def expert_ranks(self) -> int:
        """Number of ranks that hold a mixture's experts once: those of shard x context x tensor."""
        return self.shard * self.context * self.tensor

    @property
    def expert_shard(self) -> int:
        """Number of ranks that divide each expert's matrices: what `expert` leaves of `expert_ranks`."""
        return self.expert_ranks // self.expert

    @property
    def data_size(self) -> int:
        """Number of ranks that the global batch is divided over."""
        return self.replica * self.shard

    @property
    def parameter_shards(self) -> int:
        """Number of ranks that parameters, gradients and optimizer states are divided over."""
        return self.shard * self.context

    @property
    def plain_precision(self) -> Precision:
        """Of what is not a block's product with a matrix: attention, the head, and what is kept and sent."""
        return "bf16" if self.precision == "fp8" else self.precision

    def size(self, axis: Axis) -> int:
        """Number of ranks along `axis`."""
        return getattr(self, axis)

    def coordinates(self, rank: int) -> dict[Axis, int]:
        """Where a rank of the world lies along each axis."""
        places: dict[Axis, int] = {}
        for axis in reversed(self.order):
            rank, places[axis] = divmod(rank, self.size(axis))
        return {axis: places[axis] for axis in AXES}

    def accumulation(self, global_batch: int) -> int:
        """Microbatches that each rank runs in a step of `global_batch` sequences."""
        return global_batch // (self.data_size * self.microbatch)

    def placement(self) -> str:
        """The axes in use: "replica 2 x shard 4"."""
        sizes = [f"{axis} {self.size(axis)}" for axis in self.order if self.size(axis) > 1]
        experts = f" with expert {self.expert}" if self.expert > 1 else ""
        return (" x ".join(sizes) if sizes else "one process") + experts

    def label(self) -> str:
        """The layout in a few words: "replica 2 x shard 4, zero 3, microbatch 1"."""
        zero = f", zero {self.zero}" if self.parameter_shards > 1 or self.zero < 3 else ""
        first = (
            f"of {self.recompute} layer{'' if self.recompute == 1 else 's'}"
            if isinstance(self.recompute, int)
            else self.recompute
        )
        recompute = f", recompute {first}" if self.recompute not in ("none", 0) else ""
        return f"{self.placement()}{self.manner()}{zero}, microbatch {self.microbatch}{recompute}"

    def manner(self) -> str:
        """How it goes about it, where that is a choice: ", interleaved, 4 a rank"."""
        schedule = f", {self.schedule}" if self.pipeline > 1 else ""
        stages = f", {self.stages_per_rank} a rank" if self.stages_per_rank > 2 else ""
        form = ", all-to-all" if self.context_form != "ring" else ""
        return schedule + stages + form + (f", {self.offload} offloaded" if self.offload != "none" else "")

    def recomputed_layers(self, layers: int) -> int:
        """Of `layers` blocks, how many are computed again from their inputs."""
        if isinstance(self.recompute, int):
            return self.recompute
        return layers if self.recompute == "full" else 0


def check_axes(layout: Layout) -> None:
    """Raise SettingError for an axis without ranks, or an order that leaves an axis out."""
    for axis in (*AXES, "expert"):
        size: int = getattr(layout, axis)
        if size < 1:
            raise SettingError(f"layout.{axis} = {size}", "an axis has at least one rank", f"layout.{axis} = 1")
    if sorted(layout.order) != sorted(AXES):
        raise SettingError(
            f"layout.order = {list(layout.order)}",
            "must name each axis of the mesh once",
            f"layout.order = {list(AXES)}",
        )


def check_layout(layout: Layout, global_batch: int) -> None:
    """Raise SettingError for sizes that no cluster could run."""
    check_axes(layout)
    if layout.microbatch < 1:
        raise SettingError(f"layout.microbatch = {layout.microbatch}", "must be at least 1", "layout.microbatch = 1")
    if global_batch % layout.data_size:
        up = -(-global_batch // layout.data_size) * layout.data_size
        axis, other = ("replica", layout.shard) if layout.replica > 1 else ("shard", layout.replica)
        size = layout.size(axis)
        sizes = sorted(divisors(global_batch), key=lambda near: abs(near - size))
        raise SettingError(
            f"layout.replica x layout.shard = {layout.data_size}",
            f"does not divide data.global_batch = {global_batch}",
            offers=(
                [{f"layout.{axis}": near} for near in sizes if global_batch % (near * other) == 0],
                [{"data.global_batch": up}],
            ),
        )
    if (global_batch // layout.data_size) % layout.microbatch:
        share = global_batch // layout.data_size
        sizes = sorted(divisors(share), key=lambda near: abs(near - layout.microbatch))
        raise SettingError(
            f"layout.microbatch = {layout.microbatch}",
            f"does not divide a rank's {share} sequences (data.global_batch = {global_batch} over {layout.data_size})",
            offers=[[{"layout.microbatch": near} for near in sizes]],
        )


def check_split(layout: Layout, model: ModelSpec, sequence: int) -> None:
    """Raise SettingError where the model or its samples cannot be split as the layout says."""
    tensor = layout.tensor
    reason = split_refusal(tensor, model, sequence)
    if reason:
        fewer = range(min(tensor, model.heads), 0, -1)
        near = next(size for size in fewer if not split_refusal(size, model, sequence))
        raise SettingError(f"layout.tensor = {tensor}", reason, f"layout.tensor = {near}")
    if isinstance(layout.recompute, int) and not 0 <= layout.recompute <= model.layers:
        raise SettingError(
            f"layout.recompute = {layout.recompute}",
            f"must be a number of blocks, of which model.layers = {model.layers}",
            f"layout.recompute = {min(max(0, layout.recompute), model.layers)}",
        )
    if layout.offload == "parameters" and layout.zero < 3:
        reason = "parameters that stay gathered are not offloaded"
        setting = f'layout.zero = {layout.zero} with layout.offload = "parameters"'
        raise SettingError(setting, reason, offers=([{"layout.zero": 3}], [{"layout.offload": "optimizer"}]))
    if layout.async_tensor and tensor == 1:
        raise SettingError("layout.async_tensor = true", "nothing is split along the tensor axis", "layout.tensor = 2")


def split_refusal(tensor: int, model: ModelSpec, sequence: int) -> str:
    """Why `tensor` ranks cannot share the model; "" where they can. One always can."""
    experts = model.experts
    for setting, value in (
        ("model.heads", model.heads),
        # Means nothing where no layer has a plain part.
        ("model.feed_forward", model.feed_forward if model.is_dense(0) else 0),
        ("model.experts.shared x feed_forward", experts.shared * experts.feed_forward if experts else 0),
        ("data.sequence", sequence),
    ):
        if value % tensor:
            return f"does not divide {setting} = {value}"
    if model.kv_heads % tensor and tensor % model.kv_heads:
        return f"neither divides model.kv_heads = {model.kv_heads} nor is a multiple of it"
    if tensor > model.vocabulary:
        return f"is more than model.vocabulary = {model.vocabulary}"
    # Each takes as many as the first, rounded up, while they last.
    rows = -(-model.vocabulary // tensor)
    if rows * (tensor - 1) >= model.vocabulary:
        return f"leaves the last ranks none of model.vocabulary = {model.vocabulary} tokens, at {rows} a rank"
    return ""
