"""From TOML text and `--set a.b=c` to a checked Job, and back to TOML."""

import tomllib
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast, get_args

import msgspec
import tomli_w

from meshwright.spec.cluster import Cluster, Device, Link, Nodes, check_cluster
from meshwright.spec.convert import Table, convert, section_type
from meshwright.spec.errors import Offer, SettingError, closest
from meshwright.spec.expand import TOLD, expand_cluster, is_local, without_none
from meshwright.spec.hardware import cluster_of
from meshwright.spec.job import Job, check_job
from meshwright.spec.layout import AXES, Axis, Layout, check_axes
from meshwright.spec.model import ModelSpec
from meshwright.spec.offers import keep_working
from meshwright.spec.pretrained import check_weights, expand_pretrained, no_hub
from meshwright.spec.trainer import MESHWRIGHT, expand_trainer
from meshwright.spec.zoo import expand_model

# Other job files that an error names.
SHOWN_JOBS = 3
# Common letters of two words that differ in one.
ONE_LETTER = 0.9
# A job has these sections; other TOML files have not.
NEEDED = {"run", "model", "data"}
# A --set of one of these describes a whole cluster or model, which takes the place of the one in the file; and tokens
# come from one of two keys.
WHOLE = ("cluster.gpus", "cluster.processes", "model.name", "model.config", "model.path", "trainer.name")
RIVALS = {"data.path": "sources", "data.sources": "path"}
WORDS: dict[type, dict[str, type]] = {
    Cluster: {"gpus": str, "processes": int},
    Nodes: {"gpus": str},
    Link: {"gbit_per_s": float, "ports": int},
    ModelSpec: {"config": str},
}
# What means something only where these axes have ranks: a --set that takes an axis away takes what the file says of it.
ALONG = {
    "pipeline": ("schedule", "stages_per_rank", "stage_layers"),
    "context": ("context_form",),
    "tensor": ("async_tensor",),
}


def read_job(
    path: Path,
    settings: Iterable[str] = (),
    *,
    local: Callable[[int], Cluster],
    find: Callable[[str], Path] = no_hub,
    admit: Callable[[Cluster], None] = lambda _cluster: None,
    cluster: Table | None = None,
) -> Job:
    """Decode a job file, apply `--set` settings, resolve what is left to the machine, check the whole.

    `local` describes this machine, given how many processes stand in for devices where it has no GPU; `find` says
    where the files of a hub's model are, given its name. Each is called only if the job asks for it. `admit` refuses
    a cluster that the job cannot be run on, before anything is asked of how the job is spread over it. `cluster`: a
    [cluster] table that takes the place of the file's.
    """
    table = read_toml(path, "a job file", lambda: nearby_job(path))
    if cluster is not None:
        table["cluster"] = cluster
    apply_settings(table, settings)
    return decode_job(table, local=local, find=find, admit=admit)


def read_toml(path: Path, what: str, nearest: Callable[[], str]) -> Table:
    """A file's table; raises SettingError where there is none, with what is `nearest`."""
    try:
        # Some editors put a byte order mark in front, which TOML does not know.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise SettingError(str(path), f"cannot be read as {what} ({why})", nearest()) from None
    except ValueError as error:  # a name with a null byte
        raise SettingError(repr(str(path)), f"cannot be read as {what} ({error})", nearest()) from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # more than TOMLDecodeError: endless digits, endless brackets
        raise SettingError(str(path), f"is not TOML ({error})", "see examples/quickstart.toml") from None


def read_cluster(word: str) -> Table:
    """A [cluster] table from a file that has one, a job file too, or from the name of known devices ("8xh100")."""
    path = Path(word)
    if path.suffix != ".toml" and not path.is_file():
        cluster_of(word, setting="--cluster")
        return {"gpus": word}
    table = read_toml(path, "a cluster file", lambda: "8xh100")
    section = table.get("cluster")
    if not isinstance(section, dict):
        raise SettingError(str(path), "has no [cluster] section", 'a file with [cluster], or a name such as "8xh100"')
    return cast(Table, section)


def nearby_job(path: Path) -> str:
    """Another job file to suggest: in a folder that was given, or beside a file that cannot be read."""
    folder = path if path.is_dir() else path.parent
    others = sorted(other for other in folder.glob("*.toml") if other != path) if folder.is_dir() else []
    found = [str(other) for other in others if is_job(other)]
    near = get_close_matches(str(path), found, n=1, cutoff=0.5)
    return ", ".join(near or found[:SHOWN_JOBS]) or "examples/quickstart.toml"


def is_job(path: Path) -> bool:
    """Whether a file has a job's sections."""
    try:
        return set(tomllib.loads(path.read_text(encoding="utf-8-sig"))) >= NEEDED
    except (OSError, ValueError, RecursionError):
        return False


def apply_settings(table: Table, settings: Iterable[str]) -> None:
    """Put every `a.b=c` into `table`, the later after the earlier. What one of them replaces of the file goes first, so
    that their order is of no matter otherwise."""
    settings = list(settings)
    for setting in settings:
        key, _, value = (part.strip() for part in setting.partition("="))
        section = key.partition(".")[0]
        inner = table.get(section)
        # "custom" is no model's name but says that the numbers are given.
        if key in WHOLE and value.strip("'\"") != "custom":
            table[section] = {}
        elif key in RIVALS and isinstance(inner, dict):
            cast(Table, inner).pop(RIVALS[key], None)
    for setting in settings:
        apply_setting(table, setting)
    drop_along(table, {setting.partition("=")[0].strip() for setting in settings})


def drop_along(table: Table, keys: set[str]) -> None:
    """Take out what the file says of an axis that one of the `keys` that were set leaves without ranks."""
    layout = table.get("layout")
    for axis, names in ALONG.items():
        if f"layout.{axis}" in keys and isinstance(layout, dict) and cast(Table, layout)[axis] == 1:
            for name in names:
                if f"layout.{name}" not in keys:
                    cast(Table, layout).pop(name, None)


def check_setting(setting: str) -> None:
    """Raise SettingError for an `a.b=c` that no job has."""
    table: Table = {}
    apply_setting(table, setting)
    check_keys(table, Job, "")


def apply_setting(table: Table, setting: str) -> None:
    """Put one `a.b=c` into `table`; `c` is TOML, or a bare word taken as a string."""
    key, equals, text = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise SettingError(f"--set {setting}", "must look like section.key=value", "--set run.steps=100")
    try:
        table_of_one = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        table_of_one = {}
    # Text of several lines may hold more than one value; as a whole it is a string.
    value = table_of_one["value"] if len(table_of_one) == 1 else text.strip()
    inner = table
    for part in parts[:-1]:
        found = inner.setdefault(part, {})
        if not isinstance(found, dict):
            raise SettingError(f"--set {setting}", f'"{part}" is a value, not a section', "--set run.steps=100")
        inner = cast(Table, found)
    inner[parts[-1]] = value


def decode_job(
    table: Table,
    *,
    local: Callable[[int], Cluster],
    find: Callable[[str], Path] = no_hub,
    admit: Callable[[Cluster], None] = lambda _cluster: None,
) -> Job:
    """A checked Job from a table that may leave sizes, precision and cluster to be resolved."""
    check_keys(table, Job, "")
    table = {name: dict(cast(Table, section)) for name, section in table.items()}
    unchecked = False
    if "model" in table:
        numbers, unchecked = expand_pretrained(table["model"], find)
        table["model"] = expand_model(numbers)
    if table.get("data", {}).get("sources"):
        # No default beside them; a path that was given is refused by its check.
        table["data"] = {"path": ""} | table["data"]
    if "trainer" in table:
        table["trainer"] = expand_trainer(table["trainer"])
    section = table.get("cluster", {})
    table["cluster"] = expand_cluster(section, local)
    admit(convert(table["cluster"], Cluster, "cluster"))
    job = settle(table)
    if isinstance(job, SettingError):
        raise keep_working(job, lambda offer: refusal_of(changed(table, offer)))
    if unchecked:
        check_weights(job.model)
    if is_local(section) and job.cluster.device.kind == "cpu" and job.layout.world_size < job.cluster.devices:
        # Processes share the machine: fewer of them have more of it each.
        told = {name: getattr(job.cluster, name) for name in TOLD}
        placed = msgspec.structs.replace(local(job.layout.world_size), **told)
        job = msgspec.structs.replace(job, cluster=placed)
    return job


def settle(table: Table) -> Job | SettingError:
    """The checked job of a table in which the layout alone is open, or why it is none."""
    global_batch = table.get("data", {}).get("global_batch")
    try:
        section = dict(table.get("layout", {}))
        if table.get("trainer", {}).get("gathers") is False:
            # Its parameters lie whole: what else `zero` could mean, it does not do.
            section.setdefault("zero", 1)
        layout = expand_layout(section, table["cluster"], global_batch)
        job = convert(table | {"layout": layout}, Job)
        check_job(job)
    except SettingError as error:
        return error
    return job


def refusal_of(table: Table) -> SettingError | None:
    """Why a table is no job; None where it is one."""
    job = settle(table)
    return job if isinstance(job, SettingError) else None


def changed(table: Table, offer: Offer) -> Table:
    """The table with what is offered in its place."""
    table = {name: dict(cast(Table, section)) for name, section in table.items()}
    for key, value in offer.items():
        section, _, name = key.partition(".")
        table.setdefault(section, {})[name] = value
    return table


def expand_layout(section: Table, cluster: Table, global_batch: object) -> Table:
    """Resolve what a job may leave open.

    `axis = "all"`: the devices that the other axes leave, as many as divide the batch; `microbatch = "all"`: a rank's
    whole share of the batch; `precision = "auto"`: fp32 on CPUs, bf16 elsewhere.
    """
    filled = dict(section)
    placed = convert(cluster, Cluster, "cluster")
    check_cluster(placed, 1)
    open_axes: list[Axis] = [axis for axis in AXES if filled.get(axis) == "all"]
    if len(open_axes) > 1:
        given = " and ".join(f"layout.{axis}" for axis in open_axes)
        raise SettingError(f'{given} = "all"', "only one axis can take all the devices left", f"{open_axes[0]} alone")
    for axis in open_axes:
        others = 1
        for other in AXES:
            size = filled.get(other, 1)
            others *= size if isinstance(size, int) and size > 0 else 1
        if others > placed.devices:
            taken = {other: filled[other] for other in AXES if filled.get(other, 1) not in (1, "all")}
            raise too_many(placed.devices, taken)
        filled[axis] = largest_use(placed.devices // others, filled, axis, global_batch)
    if filled.get("microbatch") == "all":
        sizes: list[Any] = [global_batch, filled.get("replica", 1), filled.get("shard", 1)]
        # Where these are no numbers, or do not divide, their own checks come next and say so.
        whole = all(isinstance(size, int) and size > 0 for size in sizes)
        filled["microbatch"] = max(1, sizes[0] // (sizes[1] * sizes[2])) if whole else 1
    if filled.get("precision", "auto") == "auto":
        filled["precision"] = "bf16" if placed.device.is_accelerator else "fp32"
    return filled


def too_many(devices: int, sizes: dict[str, Any]) -> SettingError:
    """The refusal of axes that need more devices than there are."""
    named = " x ".join(f"layout.{axis} = {size}" for axis, size in sizes.items())
    reason = (
        f"needs more than the {devices} devices of the cluster" if devices > 1 else "needs more than the one device"
    )
    if len(sizes) > 1:
        return SettingError(named, reason, f"sizes that multiply to {devices}, or a larger cluster")
    halves = [devices >> times for times in range(devices.bit_length())]
    return SettingError(named, reason, offers=[[{f"layout.{axis}": size} for axis in sizes for size in halves]])


def largest_use(left: int, layout: Table, axis: Axis, global_batch: object) -> int:
    """As many of the devices left as the global batch can be divided over."""
    other = layout.get("shard" if axis == "replica" else "replica", 1)
    if axis not in ("replica", "shard") or not isinstance(global_batch, int) or not isinstance(other, int):
        return left
    sizes = (size for size in range(left, 0, -1) if other > 0 and global_batch % (size * other) == 0)
    return next(sizes, left)


def check_made(layout: Layout) -> None:
    """Raise SettingError for a layout that no job file could give: made in Python, its words are not checked yet."""
    convert(msgspec.to_builtins(layout), Layout, "layout")
    check_axes(layout)


def check_keys(table: Table, kind: type[msgspec.Struct], prefix: str) -> None:
    """Refuse keys that `kind` does not have, naming the one that was probably meant.

    msgspec refuses them too, but names neither the whole key nor the nearest one.
    """
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    # What a job file may say instead of the numbers; expand_cluster and expand_pretrained read these words.
    fields |= WORDS.get(kind, {})
    for key, value in table.items():
        name = f"{prefix}{key}"
        if key not in fields:
            # The right word in the wrong section is a likelier slip than a near spelling in this one, but for a letter.
            elsewhere = [f"{s.encode_name}.{key}" for s in msgspec.structs.fields(Job) if key in field_names(s.type)]
            one_letter = get_close_matches(key, fields, n=1, cutoff=ONE_LETTER)
            nearest = elsewhere[0] if elsewhere and not one_letter else f"{prefix}{closest(key, fields)}"
            raise SettingError(name, "no such setting", nearest)
        inner = section_type(fields[key])
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            if isinstance(value, dict):
                check_keys(cast(Table, value), inner, f"{name}.")
            elif value is not None and not (inner in (Device, Link) and isinstance(value, str)):
                raise SettingError(f"{name} = {value}", "is a section, not a value", f"[{name}] with keys under it")
        for item_kind in get_args(inner):
            # A list of sections, like data.sources.
            if isinstance(item_kind, type) and issubclass(item_kind, msgspec.Struct) and isinstance(value, list):
                for number, item in enumerate(cast(list[Any], value)):
                    if isinstance(item, dict):
                        check_keys(cast(Table, item), item_kind, f"{name}[{number}].")


def field_names(kind: Any) -> set[str]:
    """Names of the settings of one section."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return {field.encode_name for field in msgspec.structs.fields(kind)}
    return set()


def encode_job(job: Job) -> str:
    """The whole resolved job as TOML; `read_job` of it gives the same job on any machine."""
    table = without_none(msgspec.to_builtins(job))
    if job.trainer == MESHWRIGHT:
        del table["trainer"]
    return tomli_w.dumps(table)


def no_machine(processes: int) -> Cluster:
    """For jobs that describe their cluster: raises SettingError where one asks for this machine instead."""
    raise SettingError(f"cluster of {processes} processes", "this machine is not asked here", "cluster.gpus")


def planning_job(
    *,
    model: str,
    gpus: str | Table,
    sequence: int,
    global_batch: int,
    settings: Iterable[str] = (),
    local: Callable[[int], Cluster] = no_machine,
) -> Job:
    """A job for planning alone: a named model on a described cluster ("8xh100", "4x8xh100", or a [cluster] table)."""
    table: Table = {
        "run": {"name": "plan", "steps": 1},
        "model": {"name": model},
        "data": {"sequence": sequence, "global_batch": global_batch},
        "layout": {"shard": "all"},
        "cluster": {"gpus": gpus} if isinstance(gpus, str) else gpus,
    }
    apply_settings(table, settings)
    return decode_job(table, local=local)


def place_cluster(section: Table, local: Callable[[int], Cluster]) -> Cluster:
    """The cluster that a [cluster] table describes, checked. local: as for read_job."""
    check_keys({"cluster": section}, Job, "")
    cluster = convert(expand_cluster(section, local), Cluster, "cluster")
    check_cluster(cluster, 1)
    return cluster
