"""config.json: a dataclass declares what a model reads, its annotations declare the values that are allowed.

    @dataclasses.dataclass
    class Config:
        hidden_size: int                                  # a positive whole number; no default: the key must be there
        eps: float = 1e-5                                 # a positive number
        shift: Number = 0.0                               # any number
        act: Literal["gelu", "silu"] = "gelu"             # one of these
        window: int | None = None                         # null is allowed
        layers: tuple[Index, ...] = ()                    # a list; an Index is a whole number from 0 up
        text_config: TextConfig = field(default_factory=TextConfig)    # an object with a dataclass of its own

Whole numbers are below 2^31 and the others are what float32 can hold, as models count in the one and compute in the other. A
list has at most 10,000 entries.

Keys without a field belong to other programs, except those that would make the model compute something else: `only` checks
these against a table of the values that are implemented.
"""

import dataclasses
import math
import types
import typing
from typing import Any, Literal, NewType

import torch

from nano_adrpo.errors import InputError, about
from nano_adrpo.files import read_json

Index = NewType("Index", int)
Number = NewType("Number", float)
MOST, LONGEST = 2**31, 10_000  # of a whole number, of a list
SMALLEST, LARGEST = (float(value) for value in (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max))


def read(cls, file, allowed=None, needed=()):
    """A config dataclass from a JSON file that passes `only(…, allowed, …, needed)`."""
    values = read_json(file)
    only(values, allowed or {}, file, needed)
    return parse(cls, values, file)


def parse(cls, values, where):
    """A config dataclass from the values of a config.json. `where` names the file. Raises InputError naming file and key."""
    hints, chosen = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        kind, name = hints[field.name], field.name
        if dataclasses.is_dataclass(kind):
            chosen[name] = parse(kind, section(values, name, where), where)
        elif name in values:
            if not fits(values[name], kind):
                raise InputError(f"{where}: key '{name}' is {values[name]!r}; expected {describe(kind)}{limit(values[name])}")
            value = values[name]
            value = float(value) if type(value) is int and MOST <= abs(value) <= LARGEST else value  # torch takes no such int
            chosen[name] = tuple(value) if typing.get_origin(kind) is tuple else value
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}: key '{name}' is missing; expected {describe(kind)}")
    with about(where):
        return cls(**chosen)


def only(values, allowed, where, needed=()):
    """Checks keys that change what a model computes.

    allowed   {key: (values that are implemented, …)}; an absent key passes
    needed    the keys that may not be absent, because what is meant then is not implemented

    Weights that were quantised by a library are implemented nowhere. Raises InputError naming file and key.
    """
    if quantised := values.get("quantization_config"):
        inside = quantised if isinstance(quantised, dict) else {}
        old = "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & inside.keys() else None  # before quant_method was written
        method = inside.get("quant_method", old)
        raise InputError(
            f"{where}: key 'quantization_config': weights quantised by {method!r} are not read; expected plain ones"
        )
    for key, kinds in allowed.items():
        if key in needed and key not in values:
            raise InputError(f"{where}: key '{key}' is missing; expected {either(kinds)}")
        if key in values and not among(values[key], kinds):
            raise InputError(f"{where}: key '{key}' is {values[key]!r}; expected {either(kinds)}")


def section(values, key, where):
    """The JSON object below `key`; an absent one and null are an empty one."""
    if not isinstance(inside := values.get(key), dict | None):
        raise InputError(f"{where}: key '{key}' is {inside!r}; expected a JSON object")
    return inside or {}


def fits(value, kind):
    """Whether a value of a JSON file is what an annotation declares."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inside)
    if origin is Literal:
        return among(value, inside)
    if origin is tuple:
        return isinstance(value, list | tuple) and not limit(value) and all(fits(each, inside[0]) for each in value)
    if kind is int:
        return type(value) is int and 0 < value < MOST
    if kind is float:
        return type(value) in (int, float) and SMALLEST <= value <= LARGEST
    if kind is Index:
        return type(value) is int and 0 <= value < MOST
    if kind is Number:
        return type(value) in (int, float) and -LARGEST <= value <= LARGEST
    return type(value) is kind


def limit(value):
    """The limit that a value is beyond, as the end of a message; "" where it is beyond none."""
    if isinstance(value, list | tuple):
        return f" with at most {LONGEST} entries" if len(value) > LONGEST else next(filter(None, map(limit, value)), "")
    if isinstance(value, int) and abs(value) >= MOST:
        return " below 2^31"
    beyond = isinstance(value, float) and math.isfinite(value) and value and not SMALLEST <= abs(value) <= LARGEST
    return " that float32 can hold" if beyond else ""


def describe(kind):
    """An annotation in words, for messages."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(each) for each in inside)
    if origin is Literal:
        return either(inside)
    if origin is tuple:
        return f"a list, each {describe(inside[0])}"
    names = {int: "a positive int", float: "a positive float", str: "a text", bool: "true or false", dict: "an object"}
    return (names | {Index: "an int from 0 up", Number: "a number", types.NoneType: "null"})[kind]


def among(value, kinds):
    """Whether `value` is one of `kinds`. Python's True is also 1; here it is not."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in kinds)


def either(kinds):
    return " or ".join(map(repr, kinds))
