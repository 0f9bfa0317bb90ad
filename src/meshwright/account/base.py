"""Arithmetic that the three accounts share."""

from collections.abc import Sequence
from typing import Any, Self, TypeVar

import msgspec

A = TypeVar("A", bound="Account")


class Account(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Named quantities that add up to a whole, with sum, difference, scaling, mean and share.

    Fields are floats, or accounts themselves; all are part of the total.
    """

    def __add__(self, other: Self) -> Self:
        return _combine(self, other, 1.0)

    def __sub__(self, other: Self) -> Self:
        return _combine(self, other, -1.0)

    def scaled(self, factor: float) -> Self:
        """Every field times `factor`."""
        values = ((name, getattr(self, name)) for name in self.__struct_fields__)
        return type(self)(**{n: v.scaled(factor) if isinstance(v, Account) else v * factor for n, v in values})

    def total(self) -> float:
        """Sum of all fields."""
        total = 0.0
        for value in msgspec.structs.astuple(self):
            total += value.total() if isinstance(value, Account) else value
        return total

    def rows(self) -> list[tuple[str, float]]:
        """(name as written in the design and in JSON, value) of every field, in order; a nested account is one row."""
        pairs = zip(self.__struct_encode_fields__, self.__struct_fields__, strict=True)
        values = ((name, getattr(self, attribute)) for name, attribute in pairs)
        return [(name, v.total() if isinstance(v, Account) else float(v)) for name, v in values]

    def share(self, name: str) -> float:
        """A field's part of the total, 0 to 1."""
        total = self.total()
        return dict(self.rows())[name] / total if total else 0.0


def _combine(one: A, two: A, sign: float) -> A:
    values: dict[str, Any] = {}
    for name in one.__struct_fields__:
        a, b = getattr(one, name), getattr(two, name)
        values[name] = _combine(a, b, sign) if isinstance(a, Account) else a + sign * b
    return type(one)(**values)


def mean(accounts: Sequence[A]) -> A:
    """Field by field mean, over ranks or over steps. Raises ValueError for none."""
    if not accounts:
        raise ValueError("mean of no accounts")
    total = accounts[0]
    for account in accounts[1:]:
        total = total + account
    return total.scaled(1.0 / len(accounts))
