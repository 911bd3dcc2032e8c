"""Files damaged in every way that a seed can think of: bytes, and the values in JSON."""

import copy
import json

NUMBERS = [0, 1, -1, 2, 3, 7, 0.5, 2**31 - 1, 2**31, 10**12, 10**30, 10**400, 1e-300, 1e300, float("nan"), float("inf")]
TEXTS = [
    "",
    "x",
    "../outside",
    "/etc/passwd",
    "sub/../../outside",
    "..",
    "\x1b[31m\n",
    "\u202e",
    "a" * 5000,
    "(a+)+$",
    "(((",
    "\x00",
]
OTHERS = [None, True, False, [], {}, [[]], {"a": 1}, [1, 2, 3], ["a"], [10**8] * 3]


def nested(depth=100):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


def leaves(value, path=()):
    """The paths of all values inside a JSON value."""
    for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(inside, dict | list):
            yield from leaves(inside, (*path, key))


def of_json(value, rng, more=()):
    """A copy with some values replaced, left out or renamed. more: further values to put in."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        *path, key = rng.choice(list(leaves(value)))
        inside = value
        for each in path:
            inside = inside[each]
        if isinstance(inside, dict) and rng.random() < 0.2:
            moved = inside.pop(key)
            if rng.random() < 0.5:
                inside[rng.choice(TEXTS)] = moved
        else:
            new = rng.choice([rng.choice(NUMBERS), rng.choice(TEXTS), rng.choice(OTHERS), nested(), *more])
            inside[key] = copy.deepcopy(new)
        if not value:
            break
    return value


def of_bytes(content, rng):
    """A copy with bits flipped, bytes left out, repeated or put in, or cut off."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(content) + 1)
        kind = rng.choice(["flip", "flip", "cut", "drop", "repeat", "put"])
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del content[at:]
        elif kind == "drop":
            del content[at : at + rng.choice([1, 2, 8, 64])]
        elif kind == "repeat":
            content[at:at] = content[at : at + rng.choice([1, 4, 32])] * rng.choice([1, 3])
        else:
            content[at:at] = rng.choice(
                [b"\xff" * 8, b"\0" * 8, b"\x1b[2J", b"{", b"]", b'"', b"9" * 30, b"\n", "é\u2028".encode()]
            )
    return bytes(content)


def of_text(content, rng, more=()):
    """A JSON file's bytes, damaged as JSON or as bytes."""
    if rng.random() < 0.7:
        return json.dumps(of_json(json.loads(content), rng, more)).encode()
    return of_bytes(content, rng)
