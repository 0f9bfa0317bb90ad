"""Which modules of a model a layout works on, found by patterns over their names; and what is refused there."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import get_args

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshwright.parallel.tensor import Heads
from meshwright.spec import AXES, Layout, SettingError, Split, SplitTable, closest, nearest_divisor, split_of
from meshwright.spec.decode import check_made

# Axes that need to know more of a model than its modules' names, and what of it.
NOT_FOR_ANY = {
    "pipeline": "where another model can be cut into stages is not known",
    "context": "where another model's attention is, and what it may see, is not known",
    "expert": "where another model's experts are, and what routes to them, is not known",
}
# The dim of a weight whose length a word divides over ranks; its activations are cut alike, so it must divide evenly.
DIVIDED = {"column": 0, "kv_heads": 0, "row": 1}
# Words for what works on the whole sequence, which a "gather" around it gives.
INSIDE_GATHER = ("column", "kv_heads", "heads", "row")
NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)


def find_units(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The outermost modules whose names match a pattern, in the order of the model."""
    refuse_text("blocks", patterns)
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise SettingError(f'blocks "{pattern}"', "matches no module", nearest_pattern(pattern, names))
        if isinstance(model.get_submodule(matched[0]), NEVER_CALLED):
            raise SettingError(f'blocks "{pattern}"', "is a list of modules and is never called", f'"{pattern}.*"')
    units: dict[str, nn.Module] = {}
    for name in names:
        inside = any(name.startswith(f"{unit}.") for unit in units)
        if not inside and any(fnmatchcase(name, pattern) for pattern in patterns):
            units[name] = model.get_submodule(name)
    return list(units.values())


def find_tail(model: nn.Module, names: Sequence[str], units: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules of these names, which are neither in a block nor around one, nor around one another."""
    refuse_text("tail", names)
    known = {name: module for name, module in model.named_modules() if name}
    in_units = {id(module) for unit in units for module in unit.modules()}
    taken: dict[int, str] = {}
    for name in names:
        if name not in known:
            raise SettingError(f'tail "{name}"', "is no module", closest(name, known))
        inside = {id(module) for module in known[name].modules()}
        if isinstance(known[name], NEVER_CALLED):
            raise SettingError(f'tail "{name}"', "is a list of modules and is never called", "the modules in it")
        if inside & in_units:
            raise SettingError(f'tail "{name}"', "has modules of a block", "modules that run after the blocks")
        if other := next((taken[module] for module in inside if module in taken), None):
            raise SettingError(f'tail "{name}"', f'has modules of "{other}", which is there too', f'one "{name}" alone')
        taken |= dict.fromkeys(inside, name)
    return [known[name] for name in names]


def refuse_text(argument: str, given: Sequence[str]) -> None:
    """Raise SettingError for one word where a list of them is meant: its letters would be taken for words."""
    if isinstance(given, str):
        raise SettingError(f'{argument} = "{given}"', "must be a list", f'{argument} = ["{given}"]')


def nearest_pattern(pattern: str, names: Sequence[str]) -> str:
    """Of the modules' names, their numbers made *, the one nearest to `pattern`."""
    general = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)
    return f'"{closest(pattern, general)}"'


def check_units(
    model: nn.Module, layout: Layout, mesh: DeviceMesh, units: Sequence[nn.Module], tail: Sequence[nn.Module]
) -> None:
    """Raise SettingError for a layout that this mesh, these units or this tail cannot have."""
    check_made(layout)
    for axis in (axis for axis in NOT_FOR_ANY if getattr(layout, axis) > 1):
        setting = f"layout.{axis} = {getattr(layout, axis)}"
        raise SettingError(setting, NOT_FOR_ANY[axis], f"layout.{axis} = 1")
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
    if layout.async_tensor and mesh.device_type != "cuda":
        raise SettingError("layout.async_tensor = true", "needs GPUs", "layout.async_tensor = false")
    check_shared(model, layout, [*units, *tail])


def check_shared(model: nn.Module, layout: Layout, gathered: Sequence[nn.Module]) -> None:
    """Raise SettingError for a parameter of two names that would become two parameters."""
    apart = {id(parameter) for module in gathered for parameter in module.parameters()}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and (layout.tensor > 1 or parameter.is_meta or id(parameter) in apart):
            reason = f"is the same parameter as {other}, and they would come apart"
            nearest = "a model with values and no shared parameter in a block or in the tail, tensor = 1"
            raise SettingError(f"{name}", reason, nearest)


def check_table(model: nn.Module, table: SplitTable | None, size: int, heads: Heads | None) -> None:
    """Raise SettingError where a split table does not fit the model, or the model not `size` ranks."""
    if table is None:
        raise SettingError(f"layout.tensor = {size}", "the model has no split table", "layout.tensor = 1, or a table")
    names = [name for name, _ in model.named_modules() if name]
    for pattern, word in table.items():
        if word not in get_args(Split):
            setting = f'table "{pattern}" = "{word}"'
            raise SettingError(setting, "is no word of a split table", closest(word, get_args(Split)))
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SettingError(f'table "{pattern}"', "matches no module", nearest_pattern(pattern, names))
    for name, module in model.named_modules():
        word, own = split_of(table, name), dict(module.named_parameters(recurse=False))
        if own and word is None:
            # Its gradients would be those of this rank's part of the sequence, and nobody would sum them.
            reason = f"has parameters ({', '.join(own)}) and no word, so its gradients would not be summed"
            raise SettingError(f'table "{name}"', reason, f'"{name}" = "sequence", if it works on each position alone')
        if word in INSIDE_GATHER and "gather" not in (split_of(table, outer) for outer in around(name)):
            # It would take this rank's part of the sequence for the whole.
            nearest = f'"{name.rpartition(".")[0] or name}" = "gather"'
            raise SettingError(f'table "{name}" = "{word}"', 'is inside no module that says "gather"', nearest)
        if word in ("router", "experts"):
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


def around(name: str) -> list[str]:
    """Names of the modules that a module is in, itself not among them."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def check_heads(name: str, heads: Heads | None, size: int) -> None:
    """Raise SettingError where key heads cannot be given to `size` ranks."""
    if heads is None:
        raise SettingError(f'table "{name}" = "kv_heads"', "needs to know the heads", "kv_heads=..., head_dim=...")
    kv_heads = heads.kv_heads
    if kv_heads % size and size % kv_heads:
        reason = f"neither divides kv_heads = {kv_heads} nor is a multiple of it"
        raise SettingError(f"layout.tensor = {size}", reason, f"layout.tensor = {nearest_divisor(kv_heads, size)}")
