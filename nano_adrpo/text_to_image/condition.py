"""What the transformer sees of the prompts, and what the families' encoders have in common."""

import dataclasses

import torch

from nano_adrpo.errors import InputError


@dataclasses.dataclass
class Condition:
    """B encoded prompts. condition[rows] picks and repeats prompts as a tensor's rows, e.g. condition[[0, 0, 1, 1]]."""

    context: torch.Tensor  # [B, L, D], token embeddings
    pooled: torch.Tensor | None = None  # [B, P], one vector for the whole prompt; None in a family without one
    mask: torch.Tensor | None = None  # [B, L] int64, 1 at tokens and 0 at padding; None: all L are attended to

    def tensors(self):
        """{name: tensor} of the fields that are there, in the order in which the family's transformer takes them."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def each(self, change):
        """`change` applied to every tensor."""
        return Condition(**{name: change(tensor) for name, tensor in self.tensors().items()})

    def __len__(self):
        return len(self.context)

    def __getitem__(self, rows):
        return self.each(lambda tensor: tensor[rows])

    def to(self, *args, **kwargs):
        """As nn.Module.to: another device, another dtype; the mask keeps its whole numbers."""
        moved = self.each(lambda tensor: tensor.to(*args, **kwargs))
        moved.mask = self.mask if self.mask is None else moved.mask.to(self.mask.dtype)
        return moved

    @staticmethod
    def cat(conditions):
        """Some conditions, one behind the other."""
        rows = [condition.tensors() for condition in conditions]
        return Condition(**{name: torch.cat([row[name] for row in rows]) for name in rows[0]})


class Encoder:
    """Prompts to Conditions. A family's encoder has

    device                   where it computes
    _encode(texts, negative)   a list of B strings -> Condition
    from_pretrained(path, dtype=None, device=None, base=None, t5="load", …)   opens a release, see release.Release; the options
                             from t5 on are the family's own, and a family without T5 takes no notice of `t5`
    save_pretrained(path)    writes diffusers' folders; -> their entries of model_index.json
    alike                    whether a negative prompt is encoded as any other
    lower                    whether prompts are lower-cased, as the family's pipeline in diffusers does it or not
    """

    alike, lower = True, False

    @torch.no_grad()
    def encode(self, prompts, negative=False, batch=64, device=None):
        """A list of B strings -> Condition on `device` (None: the encoder's). negative: whether guidance leads away from them.

        Encodes each distinct prompt once, `batch` at a time."""
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"prompts is {prompts!r}; expected a list of strings")
        prompts = [prompt.lower() for prompt in prompts] if self.lower else prompts
        distinct = list(dict.fromkeys(prompts))
        batches = [distinct[i : i + batch] for i in range(0, len(distinct), batch)]
        condition = Condition.cat([self._encode(texts, negative).to(device or self.device) for texts in batches])
        rows = {prompt: row for row, prompt in enumerate(distinct)}
        return condition if len(distinct) == len(prompts) else condition[[rows[prompt] for prompt in prompts]]

    def encode_both(self, prompts, negative_prompt, device=None):
        """-> (Condition of the B prompts, Condition of the one negative prompt)."""
        if not self.alike:
            return self.encode(prompts, device=device), self.encode([negative_prompt], True, device=device)
        together = self.encode([*prompts, negative_prompt], device=device)
        return together[:-1], together[-1:]

    def tokens(self, tokenizer, encoder, prompts, length):
        """B strings -> ids [B, length]. Raises InputError for a tokenizer of another encoder, as far as its ids tell."""
        ids, known = tokenizer(prompts, length), encoder.config.vocab_size
        if (highest := ids.max().item()) >= known:
            raise InputError(
                f"{tokenizer.path}: gives a token the id {highest}; expected less than its encoder's {known} tokens"
            )
        return ids.to(self.device)


def save_encoder(path, suffix, encoder, tokenizer, name):
    """Writes text_encoder{suffix}/ and tokenizer{suffix}/; -> their entries of model_index.json. name: transformers' class.

    A streamed T5 is not written. Its entry is, so that the folder opens only with the release as its base."""
    if not any(parameter.is_meta for parameter in encoder.parameters()):  # a streamed encoder's are
        encoder.save_pretrained(path / f"text_encoder{suffix}")
    tokenizer.save_pretrained(path / f"tokenizer{suffix}")
    words = tokenizer.config.get("tokenizer_class", "PreTrainedTokenizerFast")
    # As in the releases' own index: transformers 4 reads tokenizer.json only with a class of this name.
    words += "Fast" if words in ("T5Tokenizer", "GemmaTokenizer") else ""
    return {f"text_encoder{suffix}": ["transformers", name], f"tokenizer{suffix}": ["transformers", words]}
