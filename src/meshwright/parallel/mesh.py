"""Process groups and the device mesh. Nothing outside this package creates either."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

from meshwright.spec import AXES, Cluster, Layout, SettingError
from meshwright.spec.decode import check_made

T = TypeVar("T")

# Long enough for a first step that compiles on one rank and not yet on another.
TIMEOUT = timedelta(minutes=10)
# The one dimension of shard x context.
SHARD_CONTEXT = "shard_context"
# What parameters are split over, a mixture's experts over the last: gathered, they are not on it.
SHARDING_AXES = frozenset({"shard", SHARD_CONTEXT, "expert_shard"})


def start_distributed(cluster: Cluster | None = None) -> torch.device:
    """Join the process group as the launcher's environment says; return this rank's device.

    On the cluster's kind of device; without a cluster on GPUs, if this process sees any.
    NCCL on GPUs, gloo on CPUs: everything after this line is the same for both.
    """
    gpus = torch.cuda.is_available() if cluster is None else cluster.device.kind == "cuda"
    if gpus:
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=TIMEOUT)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return device


def build_mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """A mesh over all of the design's axes, those of size 1 included.

    Ranks are laid along `layout.order`, outermost first, so the last axis has neighbouring ranks; the mesh itself
    always names its dimensions in the order of AXES, so that code may slice it without knowing the placement.
    Raises SettingError for a layout that is none, or of another number of ranks than there are.
    """
    check_made(layout)
    if layout.world_size != dist.get_world_size():
        setting, ranks = f"layout of {layout.world_size} ranks", dist.get_world_size()
        raise SettingError(setting, f"there are {ranks}", f"sizes that multiply to {ranks}")
    sizes = [layout.size(axis) for axis in layout.order]
    ranks = torch.arange(layout.world_size).reshape(sizes)
    ranks = ranks.permute([layout.order.index(axis) for axis in AXES]).contiguous()
    return DeviceMesh(device.type, ranks, mesh_dim_names=AXES)


def named_group(name: str) -> dist.ProcessGroup:
    """The process group of this name: an operator can be given a name, but no group."""
    return _resolve_process_group(name)  # pyright: ignore[reportArgumentType] (a type of its own in some versions)


def sharding_plane(mesh: DeviceMesh, layout: Layout) -> DeviceMesh:
    """The ranks that parameters are sharded over, in one dimension, behind those that copy them, if there are any."""
    shards = mesh["shard"]
    if layout.context > 1:
        # Flattened even where shard is 1: mesh["context"] is attention's.
        shards = mesh["shard", "context"]._flatten(SHARD_CONTEXT)
    return shards if layout.replica == 1 else DeviceMesh._concatenate([mesh["replica"], shards])


def own_group(axis: DeviceMesh, name: str) -> dist.ProcessGroup:
    """The ranks of a one-dimensional mesh, as a group that FSDP's transfers do not use.

    Where they are all ranks, a mesh takes the group of all, and so would FSDP: then what the next product waits for
    would queue behind parameters that are gathered ahead. Called by every rank.
    """
    if axis.size() == dist.get_world_size() > 1:
        group = dist.new_group(group_desc=f"mesh_{name}")
        assert isinstance(group, dist.ProcessGroup)
        return group
    return axis.get_group()


def join_group(groups: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """This rank's of several groups that have no rank in common; None where it is in none. Called by every rank."""
    own: dist.ProcessGroup | None = None
    for ranks in groups:
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            assert isinstance(group, dist.ProcessGroup)
            own = group
    return own


def build_expert_mesh(layout: Layout, mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks as experts lie on them: pipeline, replica, expert_shard, expert.

    The last two are shard x context x tensor once more. Neighbours among those have different experts, because tokens
    are sent more often than an expert's matrices are gathered.
    """
    ranks = mesh.mesh.reshape(layout.pipeline, layout.replica, layout.expert_shard, layout.expert)
    return DeviceMesh(mesh.device_type, ranks, mesh_dim_names=("pipeline", "replica", "expert_shard", "expert"))


def data_rank(mesh: DeviceMesh) -> int:
    """This rank's share of the global batch: its position in replica x shard."""
    replica, shard = mesh["replica"].get_local_rank(), mesh["shard"].get_local_rank()
    return replica * mesh["shard"].size() + shard


def tell_all(decide: Callable[[], T]) -> T:
    """What rank 0 decides, on every rank. If deciding raises a SettingError there, it is raised on every rank."""
    told: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            told = [decide(), None]
        except SettingError as error:
            told = [None, error.args]
    dist.broadcast_object_list(told)
    value, refusal = told
    if refusal is not None:
        raise SettingError(*refusal)
    return value


def stop_distributed() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
