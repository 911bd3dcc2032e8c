"""Whether a tokenizer.json can be used, asked in a process of its own (files/apart.py).

The tokenizers package trusts its files. At a damaged one it may panic, which is no Exception in Python, print a page, take all
memory, or end the process, and part of this only when it encodes or decodes. So the file is tried there before it is opened.
"""

import hashlib
import json
import math
import string

from nano_adrpo.errors import InputError
from nano_adrpo.files.apart import Apart, Ended

SECONDS, MEMORY = 60, 8 * 2**30  # the largest public vocabularies take a few seconds and about 1 GiB
GROWTH = 1000  # how much longer a text may become by all that a tokenizer replaces in it

PROBES = [
    "", " ", "a", string.printable, "a" * 60 + "!", "1" * 60 + "?", "  two  words\n\n\tand <pad> </s> [CLS] <|im_end|>",
    "Café É ß İ e\u0301 \u200b\ufeff ﷺ 漢字 한국어 हिन्दी 😀👩\u200d👧",
]  # fmt: skip


def check(text, where):
    """Raises InputError, naming the file `where`, for the text of a tokenizer.json that cannot be used."""
    if (digest := hashlib.sha256(text).digest()) in passed:
        return
    try:
        with Apart(__file__, "trier", SECONDS, MEMORY) as process:
            process.ask(text.decode())
    except Ended as error:
        raise InputError(f"{where}: not a tokenizer ({str(error).removeprefix('Exception: ')})") from None
    passed.add(digest)


passed = set()  # by their hash: one run opens the same tokenizer several times


def trier():
    """-> a function of the text of a tokenizer.json."""
    from tokenizers import Tokenizer

    def answer(text):
        values = json.loads(text)
        for part in ("normalizer", "decoder") if isinstance(values, dict) else ():
            if (times := growth(values.get(part))) > GROWTH:
                raise ValueError(f"its {part} makes texts up to {times:.3g} times as long; expected at most {GROWTH}")
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        rows = [[0], [1], [0, 1, 2, 3], [max(tokenizer.get_vocab_size() - 1, 0)]]
        for probe in PROBES:
            for special in (True, False):
                try:
                    rows.append(tokenizer.encode(probe, add_special_tokens=special).ids)
                except Exception:  # noqa: BLE001, such as a letter that it lacks: told when a prompt has it
                    continue
        tokenizer.decode_batch(rows)
        tokenizer.decode_batch(rows, skip_special_tokens=False)

    return answer


def growth(part):
    """How many times as long a text can become by the replacements in a part of a tokenizer.json."""
    inside = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    own = len(str(part.get("content"))) if isinstance(part, dict) and part.get("type") == "Replace" else 1
    return math.prod([max(own, 1), *map(growth, inside)])
