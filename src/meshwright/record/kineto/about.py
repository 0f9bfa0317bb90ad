"""What a trace says beside its events: whose it is, when it began, and which ranks talk to each other."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import msgspec

from meshwright.record.kineto.event import Arguments

Groups = dict[str, tuple[str, tuple[int, ...]]]

# Ranks of a group that is given by its size alone, at most: as many as there are devices anywhere.
MOST_RANKS = 1_000_000

# torch 2.0 and older write times of the epoch, microseconds; newer ones say when their clock began. This is in 2001.
EPOCH_US = 1e15


class About(msgspec.Struct, frozen=True, kw_only=True):
    """As Trace has it."""

    rank: int = -1
    world_size: int = 0
    base_s: float = 0.0
    groups: Groups = {}
    host: str = ""
    device: str = ""


def about_trace(beside: Mapping[str, bytes], first_us: float, arguments: Iterable[Arguments]) -> About:
    """From the values beside the events, of which nothing is certain.

    first_us: begin of the first event on the file's clock. arguments: of the events, which name groups, too.
    """
    values = {key: decoded(text) for key, text in beside.items()}
    distributed = mapping(values.get("distributedInfo"))
    world_size = whole(distributed.get("world_size"), 0)
    groups = configured_groups(distributed.get("pg_config"), world_size)
    for args in arguments:
        if args.group and (args.group not in groups or not groups[args.group][1]):
            groups[args.group] = (args.description, args.ranks)
    properties = values.get("deviceProperties")
    devices = cast(list[object], properties) if isinstance(properties, list) else []
    device = mapping(devices[0]).get("name") if devices else ""
    host = values.get("host_name")
    return About(
        rank=whole(distributed.get("rank"), -1),
        world_size=world_size,
        base_s=base_s(values.get("baseTimeNanoseconds"), first_us),
        groups=groups,
        host=host if isinstance(host, str) else "",
        device=device if isinstance(device, str) else "",
    )


def decoded(text: bytes) -> object:
    """A value; None if it is no JSON."""
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return None


def mapping(value: object) -> dict[str, Any]:
    """A JSON object; empty if it is something else."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def whole(value: object, unknown: int) -> int:
    """A whole number that is not negative and may have been written as a string."""
    try:
        number = int(value) if isinstance(value, str | int | float) else unknown
    except (ValueError, OverflowError):
        return unknown
    return number if 0 <= number < 2**63 else unknown


def base_s(base_ns: object, first_us: float) -> float:
    """The epoch's second at which the first event began; 0 where the trace does not say."""
    known = whole(base_ns, 0) * 1e-9
    return known + first_us * 1e-6 if known or first_us > EPOCH_US else 0.0


def configured_groups(config: object, world_size: int) -> Groups:
    """Process groups as torch lists them, or maps their names to what it says of them or to their ranks."""
    if isinstance(config, dict):
        named = cast(dict[str, object], config).items()
        listed = [{"pg_name": name} | (mapping(said) or {"ranks": said}) for name, said in named]
    else:
        listed = [mapping(said) for said in cast(list[object], config)] if isinstance(config, list) else []
    groups: Groups = {}
    for said in listed:
        if "pg_name" not in said:
            continue
        ranks = parsed_ranks(said.get("ranks"))
        size = whole(said.get("pg_size", said.get("group_size")), 0 if said.get("ranks") else world_size)
        # torch lists no ranks where they are all of them.
        if not ranks and 0 < size == world_size <= MOST_RANKS:
            ranks = tuple(range(world_size))
        groups[str(said["pg_name"])] = (str(said.get("pg_desc") or ""), ranks)
    return groups


def parsed_ranks(value: object) -> tuple[int, ...]:
    """Ranks, as a list or its text; none where the text leaves some out ("[0, 1, ..., 63]") or it is neither."""
    if isinstance(value, str):
        value = decoded(value.encode()) if re.fullmatch(r"\s*\[[\d\s,]*\]\s*", value) else None
    if not isinstance(value, list | tuple):
        return ()
    ranks = tuple(whole(rank, -1) for rank in cast(list[object], value))
    return () if -1 in ranks else ranks
