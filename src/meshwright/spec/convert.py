"""A value of the wrong kind as one line: what it must be, and the nearest that is."""

import re
import tomllib
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import msgspec
from msgspec.structs import FieldInfo

from meshwright.spec.errors import SettingError, as_toml, in_words, nearest_choice

Table = dict[str, Any]
T = TypeVar("T")

# What values are called in docs/job.md, by what msgspec calls them.
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a section",
    "null": "nothing",
}


def convert(table: Table, kind: type[T], prefix: str = "") -> T:
    """msgspec.convert with its message turned into a setting, a reason and the nearest value.

    prefix: where `table` stands in the job.
    """
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        reason, _, where = str(error).partition(" - at `$")
        path = [part for part in where.rstrip("`").split(".") if part]
        raise explain_invalid(table, kind, reason, path, prefix) from None


def explain_invalid(table: Table, kind: type, reason: str, path: list[str], prefix: str) -> SettingError:
    """The SettingError for a msgspec message about the value at `path`."""
    section = [prefix, *path] if prefix else path
    if missing := re.search(r"missing required field `(\w+)`", reason):
        name = ".".join([*section, missing[1]])
        add = f"add {missing[1]} = ... under [{'.'.join(section)}]" if section else f"add [{missing[1]}]"
        return SettingError(name, "is missing", add)
    value: Any = table
    for part in path:
        name, *index = re.split(r"[\[\]]", part)
        value = cast(Table, value).get(name) if isinstance(value, dict) else None
        if index and isinstance(value, list) and index[0].isdigit():
            value = cast(list[Any], value)[int(index[0])]
    name, field = ".".join(section), field_of(kind, path)
    if reason.startswith("Invalid enum value") and field is not None:
        return SettingError(f"{name} = {as_toml(value)}", "is none of the choices", nearest_of(name, value, field.type))
    setting = name.partition("[")[0]
    nearest = meant_by(field, setting, value) if setting == name else ""
    return SettingError(f"{name} = {as_toml(value)}", in_our_words(reason), nearest or default_of(field, setting))


def in_our_words(reason: str) -> str:
    """A message of msgspec in the words of docs/job.md: "must be a whole number"."""
    if expected := re.match(r"Expected `(?P<kinds>[\w| ]+)`(?P<size> of length \d+)?", reason):
        kinds = [KINDS.get(kind, kind) for kind in expected["kinds"].split(" | ")]
        return f"must be {in_words(kinds)}{expected['size'] or ''}"
    return reason.lower().replace("`", "")


def nearest_of(name: str, value: Any, kind: Any) -> str:
    """What `name` may be instead, where only some values are allowed."""
    choices = choices_of(kind)
    if all(isinstance(choice, str) for choice in choices):
        return nearest_choice(name, value, choices, "a number" if int in get_args(kind) else "")
    return f"{name} = {in_words([str(choice) for choice in choices])}"


def choices_of(kind: Any) -> list[Any]:
    """The values that a type allows, where it lists them; an item's, of a list."""
    inner = get_args(kind)
    return list(inner) if get_origin(kind) is Literal else [choice for one in inner for choice in choices_of(one)]


def meant_by(field: FieldInfo | None, name: str, value: Any) -> str:
    """The value that was written in another kind: 2.0 for 2, or "4, 4" for [4, 4]; "" where it is none of these."""
    if field is None:
        return ""
    listed = [value]
    if isinstance(value, str):
        try:
            listed = tomllib.loads(f"value = [{value}]")["value"]
        except (ValueError, RecursionError):
            return ""
    meant = [listed] + [int(one) for one in [value] if isinstance(one, float) and one.is_integer()]
    for one in meant:
        try:
            msgspec.convert(one, field.type)
        except msgspec.ValidationError:
            continue
        return f"{name} = {as_toml(one)}"
    return ""


def default_of(field: FieldInfo | None, name: str) -> str:
    """ "section.key = default" for a field, or what it must be."""
    if field is None:
        return "see docs/job.md"
    if field.default is not msgspec.NODEFAULT:
        return f"{name} = {msgspec.json.encode(field.default).decode()}"
    return KINDS.get(getattr(field.type, "__name__", ""), "see docs/job.md")


def field_of(kind: Any, path: list[str]) -> FieldInfo | None:
    """The field of `kind` at a path, None where it has none there."""
    field: FieldInfo | None = None
    for part in path:
        kind = section_type(kind)
        fields = msgspec.structs.fields(kind) if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else ()
        field = next((field for field in fields if field.encode_name == part.partition("[")[0]), None)
        kind = None if field is None else field.type
    return field


def section_type(kind: Any) -> Any:
    """The section in "a section or nothing"; any other type as it is."""
    inner = [arg for arg in get_args(kind) if isinstance(arg, type) and issubclass(arg, msgspec.Struct)]
    # A list of sections is none itself.
    return inner[0] if inner and get_origin(kind) is not tuple else kind
