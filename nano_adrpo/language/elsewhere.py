"""Completions that another engine made, such as vLLM: --rollouts FILE.jsonl or FILE.py:FUNCTION. See docs/many_gpus.md.

The engine samples with kernels, and maybe in a precision, of its own, so that its probabilities differ a little from the ones
that the loss computes. Where it gives them, they are the loss's π_old: the ratio π_θ / π_old then corrects for the difference.
"""

import math

import torch
import torch.nn.functional as F

from nano_adrpo import files
from nano_adrpo.errors import InputError
from nano_adrpo.language.rollout import Rollout, texts_of
from nano_adrpo.rewards import function, its_own


def open_engine(spec, group_size, problems=()):
    """--rollouts -> a function with rollout.roll_out's arguments, whose problems stand in groups of `group_size`.

    FILE.jsonl          objects with "question" and a completion, see `tokens`. Of a group's question as many are taken as the
                        group has samples, drawn without repetition; each of `problems` must have so many
    FILE.py:FUNCTION    a function (prompts, problems, policy, max_new_tokens, temperature) -> N completions, of N prompts.
                        Prompts are lists of ids, those of a group equal and side by side. `policy` is the model as it is now,
                        whose weights the engine needs; problems[i].row is the problem's line in --problems

    Raises InputError for what they give that does not fit.
    """
    if spec.rpartition(":")[0].endswith(".py"):
        ask = function(spec).__wrapped__  # without the copies of its arguments that a reward gets: the policy is large

        def complete(prompts, problems, policy, numbers, *options):
            with its_own(spec):
                return ask(prompts, problems, policy, *options)
    else:
        stored = read(spec)
        for question in map(asked, problems):
            if (count := len(stored.get(question, []))) < group_size:
                found = f"{count} completions of the question {question[:60]!r}"
                raise InputError(f"{spec}: {found}; expected {group_size} or more, the group's size")

        def complete(prompts, problems, policy, numbers, *options):
            return taken(stored, problems, numbers, group_size)

    def roll_out(model, codec, problems, max_new_tokens, longest, numbers, temperature=1.0, steps=None):
        device = model.model.embed_tokens.weight.device
        prompts = [problem.prompt for problem in problems]
        ids, prompt_mask = codec.encode(prompts, longest, device)
        unpadded = [row[seen.bool()].tolist() for row, seen in zip(ids, prompt_mask)]
        given = complete(unpadded, problems, model, numbers, max_new_tokens, temperature)
        if not isinstance(given, list) or len(given) != len(problems):
            found = f"{len(given)} completions" if isinstance(given, list) else type(given).__name__
            raise InputError(f"{spec} gave {found}; expected a list of {len(problems)} completions")
        new, logps = zip(*[tokens(each, codec, max_new_tokens, f"{spec}, completion {i}") for i, each in enumerate(given)])
        if len({logp is None for logp in logps}) > 1:
            raise InputError(f"{spec}: some completions have 'logprobs' and some have none; expected all or none")
        width = max(map(len, new))
        fill = codec.eos[0] if codec.eos else 0

        def filled(rows, value=0):
            return torch.stack([F.pad(row, (0, width - len(row)), value=value) for row in rows]).to(device)

        completions, mask = filled(new, fill), filled([torch.ones_like(row) for row in new]).to(prompt_mask)
        logp = None if logps[0] is None else filled(logps)
        texts = texts_of(codec, ids, prompt_mask, completions, mask)
        seen = torch.cat([prompt_mask, mask], dim=1)
        padded = not bool(prompt_mask.all())
        return Rollout(torch.cat([ids, completions], dim=1), seen, mask, padded, texts, codec.clips(prompts), logp)

    return roll_out


def tokens(given, codec, longest, where):
    """One completion, {"ids": […]} or {"text": …} and with ids maybe {"logprobs": […]}, in nats, of the same tokens -> ids [C],
    and logprobs [C] or None. The end token belongs to it where the engine drew it; a text gets one. What stands behind the
    first end, such as padding, is left out."""
    if not isinstance(given, dict) or not ({"ids", "text"} & given.keys()):
        raise InputError(f"{where}: expected an object with 'ids' or 'text'")
    ids, logp = given.get("ids"), given.get("logprobs")
    if ids is None:
        if not isinstance(given["text"], str) or logp is not None:
            raise InputError(f"{where}: expected 'text' to be a text, and 'logprobs' only beside 'ids'")
        ids = [*codec.tokenizer.encode(given["text"], add_special_tokens=False).ids, *codec.eos[:1]][:longest]
    if not (isinstance(ids, list) and 1 <= len(ids) <= longest and all(type(i) is int and 0 <= i < codec.size for i in ids)):
        raise InputError(f"{where}: expected 'ids' to be 1 … {longest} numbers below the vocabulary's {codec.size}")
    if logp is not None and not (isinstance(logp, list) and len(logp) == len(ids) and all(map(nats, logp))):
        raise InputError(f"{where}: expected 'logprobs' to be {len(ids)} finite numbers, none above 0")
    end = next((place for place in range(1, len(ids)) if ended(ids[:place], codec)), len(ids))
    return torch.tensor(ids[:end]), None if logp is None else torch.tensor(logp[:end], dtype=torch.float32)


def ended(ids, codec):
    """Whether a completion is over with its newest token."""
    return ids[-1] in codec.eos or bool(codec.ended and codec.ended(torch.tensor([ids])))


def nats(value):
    return isinstance(value, int | float) and math.isfinite(value) and value <= 1e-6


def read(file):
    """{question: its completions} of a file of JSON lines."""
    found = {}
    for line, row in files.read_json_lines(file):
        if not isinstance(row.get("question"), str):
            raise InputError(f"{file}, line {line}: expected an object with a text under 'question'")
        found.setdefault(row["question"], []).append(row)
    return found


def asked(problem):
    """The question as its file has it."""
    return problem.row.get("question", problem.row.get("prompt"))


def taken(stored, problems, numbers, group_size):
    """A stored completion for each problem; `numbers` [N, …], of its rows, draw which."""
    found = []
    for start in range(0, len(problems), group_size):
        some, generator = stored[asked(problems[start])], torch.Generator().manual_seed(int(numbers[start, 0] * 2**53))
        found += [some[index] for index in torch.randperm(len(some), generator=generator)[:group_size].tolist()]
    return found
