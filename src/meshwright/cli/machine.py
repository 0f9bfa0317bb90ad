"""From what the user typed and the machine it was typed on to a job: the only reader of the environment."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.spec.errors import SettingError

if TYPE_CHECKING:
    from meshwright.spec import Cluster, Job

# How many tokens make a step where a plan is asked for without a job: a round middle of what 7B to 70B runs used
# (Llama 2: 4M, arXiv:2307.09288; GPT-3 13B: 1M, arXiv:2005.14165).
PLANNING_TOKENS = 2**20
PLANNING_SEQUENCE = 8192
# A thousand times what the largest runs so far were trained on.


def as_setting(option: str) -> str:
    """What to type instead of a planning option when there is a job file."""
    keys = {
        "--model": "--set model.name=llama3-8b",
        "--gpus": "--set cluster.gpus=8xh100",
        "--sequence": "--set data.sequence=8192",
        "--global-batch": "--set data.global_batch=64",
    }
    return keys[option]


def read(job: Path, settings: Sequence[str], cluster: str | None = None) -> "Job":
    """The job file, resolved for this machine. cluster: the name or file of one that takes the place of the job's."""
    from meshwright.spec.decode import read_cluster, read_job

    table = None if cluster is None else read_cluster(cluster)
    return read_job(job, settings, local=local, find=find, cluster=table)


def read_runnable(job: Path, settings: Sequence[str]) -> "Job":
    """The job file, resolved for this machine, which has the devices to run it."""
    from meshwright.spec import MESHWRIGHT
    from meshwright.spec.decode import read_job

    found = read_job(job, settings, local=local, find=find, admit=check_devices)
    if found.trainer != MESHWRIGHT:
        if found.trainer.name == MESHWRIGHT.name:
            raise SettingError("[trainer]", "changes what our own trainer is: it can be planned", "leave [trainer] out")
        setting = f'trainer.name = "{found.trainer.name}"'
        raise SettingError(setting, "is another program: it can be planned", "leave [trainer] out")
    return found


def described(
    model: str | None,
    gpus: str | None,
    cluster: str | None,
    sequence: int | None,
    global_batch: int | None,
    settings: tuple[str, ...],
) -> "Job":
    """A job for planning from the options alone."""
    from meshwright.spec.decode import place_cluster, planning_job, read_cluster

    if gpus is not None and cluster is not None:
        raise SettingError("--cluster", "cannot stand beside --gpus", "one of the two")
    if model is None or (gpus is None and cluster is None):
        raise SettingError(
            "meshwright plan",
            "takes a job file, or --model with --gpus or --cluster",
            "--model llama3-8b --gpus 8xh100",
        )
    section = read_cluster(cluster) if cluster is not None else {"gpus": gpus}
    sequence = PLANNING_SEQUENCE if sequence is None else sequence
    if sequence < 1:
        raise SettingError(f"--sequence {sequence}", "must be at least 1", "--sequence 8192")
    if global_batch is None:
        devices = place_cluster(section, local).devices
        global_batch = devices * max(1, round(PLANNING_TOKENS / sequence / devices))
    return planning_job(
        model=model, gpus=section, sequence=sequence, global_batch=global_batch, settings=settings, local=local
    )


def local(processes: int) -> "Cluster":
    """This machine, with the GPUs that the environment lets us see."""
    from meshwright.plan import local_cluster

    return local_cluster(processes, os.environ.get("CUDA_VISIBLE_DEVICES"))


def here(ranks: int) -> "Cluster":
    """This machine as a cluster of `ranks` devices: GPUs where there are enough, or else processes."""
    import msgspec

    from meshwright.plan import local_cluster

    found = local(ranks)
    return (
        msgspec.structs.replace(found, devices_per_node=ranks) if found.devices >= ranks else local_cluster(ranks, "")
    )


def find(name: str) -> Path:
    """Where the files of a hub's model are. torchrun's ranks do not fetch: all of them would."""
    from meshwright.launch import find_model

    return find_model(name, download=not under_torchrun())


def under_torchrun() -> bool:
    """Whether an external torchrun started this process as one of its ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def check_devices(wanted: "Cluster") -> None:
    """Refuse to train on GPUs that are not here: a job may describe a cluster to plan for."""
    from meshwright.spec import check_kind

    check_kind(wanted.device)
    here = local(wanted.devices_per_node)
    # Under torchrun every node starts its own ranks; without it all of them start here.
    needed = wanted.devices_per_node if under_torchrun() else wanted.devices
    if wanted.device.kind == "cuda" and (here.device.kind != "cuda" or here.devices < needed):
        raise SettingError(
            f"cluster of {wanted.label()}",
            f"this machine has {here.label() if here.device.kind == 'cuda' else 'no GPU'}",
            "a job without cluster.gpus, which takes what is here",
        )
