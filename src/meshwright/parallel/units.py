"""Which modules of a model a layout works on, found by patterns over their names; and what is refused there."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshwright.models import Experts
from meshwright.models.experts import Router
from meshwright.parallel.tensor import Heads
from meshwright.spec import AXES, Layout, SettingError, SplitTable, check_axes, closest, nearest_divisor, split_of

# The dim of a weight whose length a word divides over ranks; its activations are cut alike, so it must divide evenly.
DIVIDED = {"column": 0, "kv_heads": 0, "row": 1}


def find_units(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The outermost modules whose names match a pattern, in the order of the model."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise SettingError(f'blocks "{pattern}"', "matches no module", nearest_pattern(pattern, names))
        if isinstance(model.get_submodule(matched[0]), nn.ModuleList | nn.ModuleDict):
            raise SettingError(f'blocks "{pattern}"', "is a list of modules and is never called", f'"{pattern}.*"')
    units: dict[str, nn.Module] = {}
    for name in names:
        inside = any(name.startswith(f"{unit}.") for unit in units)
        if not inside and any(fnmatchcase(name, pattern) for pattern in patterns):
            units[name] = model.get_submodule(name)
    return list(units.values())


def find_tail(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The modules of these names."""
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            raise SettingError(f'tail "{name}"', "is no module", closest(name, known))
    return [known[name] for name in names]


def nearest_pattern(pattern: str, names: Sequence[str]) -> str:
    """Of the modules' names, their numbers made *, the one nearest to `pattern`."""
    general = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)
    return f'"{closest(pattern, general)}"'


def check_units(model: nn.Module, layout: Layout, mesh: DeviceMesh, units: Sequence[nn.Module]) -> None:
    """Raise SettingError for a layout that this mesh or these units cannot have."""
    check_axes(layout)
    if layout.expert > 1 and not any(isinstance(module, Experts) for module in model.modules()):
        raise SettingError(
            f"layout.expert = {layout.expert}", "the model has no experts to divide", "layout.expert = 1"
        )
    for axis in AXES:
        found = mesh[axis].size()
        if layout.size(axis) != found:
            setting = f"layout.{axis} = {layout.size(axis)}"
            raise SettingError(setting, f"the mesh has {found} ranks there", f"layout.{axis} = {found}")
    if isinstance(layout.recompute, int) and not 0 <= layout.recompute <= len(units):
        nearest = f"layout.recompute = {min(max(0, layout.recompute), len(units))}"
        raise SettingError(f"layout.recompute = {layout.recompute}", f"there are {len(units)} blocks", nearest)
    if layout.async_tensor and layout.tensor == 1:
        raise SettingError("layout.async_tensor = true", "nothing is split along the tensor axis", "layout.tensor = 2")
    unit_of = {id(p): number for number, unit in enumerate(units) for p in unit.parameters()}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and (layout.tensor > 1 or parameter.is_meta or id(parameter) in unit_of):
            reason = f"is the same parameter as {other}, and they would come apart"
            raise SettingError(f"{name}", reason, "a model with values and no shared parameter in a block, tensor = 1")


def check_table(model: nn.Module, table: SplitTable | None, size: int, heads: Heads | None) -> None:
    """Raise SettingError where a split table does not fit the model, or the model not `size` ranks."""
    if table is None:
        raise SettingError(f"layout.tensor = {size}", "the model has no split table", "layout.tensor = 1, or a table")
    names = [name for name, _ in model.named_modules() if name]
    for pattern in table:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SettingError(f'table "{pattern}"', "matches no module", nearest_pattern(pattern, names))
    for name, module in model.named_modules():
        word, own = split_of(table, name), dict(module.named_parameters(recurse=False))
        if own and word is None:
            # Its gradients would be those of this rank's part of the sequence, and nobody would sum them.
            reason = f"has parameters ({', '.join(own)}) and no word, so its gradients would not be summed"
            raise SettingError(f'table "{name}"', reason, f'"{name}" = "sequence", if it works on each position alone')
        if word in ("router", "experts") and not isinstance(module, Router | Experts):
            raise SettingError(f'table "{name}" = "{word}"', "is for Meshwright's own mixtures", '"sequence"')
        if word == "kv_heads":
            check_heads(name, heads, size)
        shared = word == "kv_heads" and heads is not None and heads.kv_heads < size
        if word in DIVIDED and "weight" in own and not shared:
            length = own["weight"].shape[DIVIDED[word]]
            if length % size:
                reason = f"does not divide {name}.weight, {length} long"
                nearest = f"layout.tensor = {nearest_divisor(length, size)}"
                raise SettingError(f"layout.tensor = {size}", reason, nearest)


def check_heads(name: str, heads: Heads | None, size: int) -> None:
    """Raise SettingError where key heads cannot be given to `size` ranks."""
    if heads is None:
        raise SettingError(f'table "{name}" = "kv_heads"', "needs to know the heads", "kv_heads=..., head_dim=...")
    kv_heads = heads.kv_heads
    if kv_heads % size and size % kv_heads:
        reason = f"neither divides kv_heads = {kv_heads} nor is a multiple of it"
        raise SettingError(f"layout.tensor = {size}", reason, f"layout.tensor = {nearest_divisor(kv_heads, size)}")
