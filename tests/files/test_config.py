"""config.json: what the annotations allow and how the rest is refused, in one line that names file and key."""

import dataclasses
import json
from dataclasses import field
from typing import Any, Literal

import pytest

from nano_adrpo.errors import InputError
from nano_adrpo.files import config
from nano_adrpo.files.config import Index, Number


@dataclasses.dataclass
class Inner:
    size: int = 3

    def __post_init__(self):
        if self.size == 13:
            raise InputError("size is 13; expected another")


@dataclasses.dataclass
class Outer:
    width: int
    eps: float = 1e-5
    shift: Number = 0.0
    act: Literal["gelu", "silu"] = "gelu"
    bias: bool = False
    name: str = ""
    window: int | None = None
    layers: tuple[Index, ...] = ()
    sizes: int | tuple[int, ...] = 1
    other: Any = None
    inner: Inner = field(default_factory=Inner)


def test_values_that_are_allowed():
    values = {"width": 4, "eps": 1, "shift": -2, "act": "silu", "bias": True, "name": "x", "window": 7, "layers": [0, 2]}
    parsed = config.parse(Outer, values | {"sizes": [3, 4], "other": {}, "inner": {"size": 5}, "unknown": 0}, "f")
    assert parsed == Outer(4, 1, -2, "silu", True, "x", 7, (0, 2), [3, 4], {}, Inner(5))
    assert config.parse(Outer, {"width": 4, "window": None, "inner": None}, "f") == Outer(4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": -1}, "f: key 'width' is -1; expected a positive int"),
        ({"width": 2.0}, "f: key 'width' is 2.0; expected a positive int"),
        ({"width": True}, "f: key 'width' is True; expected a positive int"),
        ({"width": None}, "f: key 'width' is None; expected a positive int"),
        ({"eps": float("nan")}, "f: key 'eps' is nan; expected a positive float"),
        ({"eps": "x"}, "f: key 'eps' is 'x'; expected a positive float"),
        ({"shift": float("inf")}, "f: key 'shift' is inf; expected a number"),
        ({"act": []}, "f: key 'act' is []; expected 'gelu' or 'silu'"),
        ({"bias": 1}, "f: key 'bias' is 1; expected true or false"),
        ({"name": 1}, "f: key 'name' is 1; expected a text"),
        ({"window": 0}, "f: key 'window' is 0; expected a positive int or null"),
        ({"layers": "01"}, "f: key 'layers' is '01'; expected a list, each an int from 0 up"),
        ({"layers": [-1]}, "f: key 'layers' is [-1]; expected a list, each an int from 0 up"),
        ({"sizes": [1.5]}, "f: key 'sizes' is [1.5]; expected a positive int or a list, each a positive int"),
        ({"width": 2**31}, "f: key 'width' is 2147483648; expected a positive int below 2^31"),
        ({"layers": [10**12]}, "f: key 'layers' is [1000000000000]; expected a list, each an int from 0 up below 2^31"),
        ({"eps": 1e-300}, "f: key 'eps' is 1e-300; expected a positive float that float32 can hold"),
        ({"shift": 1e39}, "f: key 'shift' is 1e+39; expected a number that float32 can hold"),
        ({"eps": {}}, "f: key 'eps' is {}; expected a positive float"),
        ({"inner": 5}, "f: key 'inner' is 5; expected a JSON object"),
        ({"inner": {"size": 0}}, "f: key 'size' is 0; expected a positive int"),
        ({"inner": {"size": 13}}, "f: size is 13; expected another"),  # what a config's __post_init__ refuses
    ],
)
def test_other_values_are_refused(change, message):
    with pytest.raises(InputError) as error:
        config.parse(Outer, {"width": 4} | change, "f")
    assert str(error.value) == message


def test_keys_that_change_the_computation(tmp_path):
    file, allowed = tmp_path / "config.json", {"kind": ("a", "b"), "tied": (False, None), "scale": (1, None)}

    def read(values):
        file.write_text(json.dumps({"width": 4} | values))
        return config.read(Outer, file, allowed, needed=("kind",))

    assert read({"kind": "b"}) == read({"kind": "a", "tied": None, "scale": 1.0}) == Outer(4)
    for values, message in (
        ({}, "key 'kind' is missing; expected 'a' or 'b'"),
        ({"kind": None}, "key 'kind' is None; expected 'a' or 'b'"),
        ({"kind": "a", "tied": True}, "key 'tied' is True; expected False or None"),
        ({"kind": "a", "tied": 0}, "key 'tied' is 0; expected False or None"),
        ({"kind": "a", "scale": True}, "key 'scale' is True; expected 1 or None"),
    ):
        with pytest.raises(InputError) as error:
            read(values)
        assert str(error.value) == f"{file}: {message}"
    with pytest.raises(InputError, match="^f: key 'width' is missing; expected a positive int$"):
        config.parse(Outer, {}, "f")
