"""Language models beside transformers and TRL: rollouts, log-probabilities, a GRPO step. Both sides have the same weights."""

import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from transformers.utils import logging

from bench.measure import Case
from nano_adrpo import adrpo
from nano_adrpo.demo import GRPO
from nano_adrpo.language import chat, rollout
from nano_adrpo.models.decoder import Config, Decoder
from nano_adrpo.rewards.text import read_problems

WIDE = {  # Qwen2.5-0.5B without its number of layers
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
    "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip


def both(layers, device, **changes):
    """A model of random weights as ours and as transformers', which share their tensors."""
    torch.manual_seed(0)
    sizes = {**WIDE, **changes, "num_hidden_layers": layers}
    theirs = AutoModelForCausalLM.from_config(Qwen2Config(**sizes)).to(device).eval()
    with torch.device("meta"):
        ours = Decoder(Config("qwen2", **sizes))
    ours.load_state_dict({name: theirs.state_dict()[name] for name in ours.state_dict()}, assign=True)
    return ours, theirs


def generation(name, ours, theirs, ids, mask, samples, new, eos=None, **options):
    """Sampling at temperature 1, seconds per token that counts; they agree if their greedy completions are equal."""
    pad, device = {"pad_token_id": eos[0] if eos else 0, "eos_token_id": eos}, ids.device
    rows, seen = ids.repeat_interleave(samples, dim=0), mask.repeat_interleave(samples, dim=0)
    generator = torch.Generator(device).manual_seed(0)

    def lengths(completions):
        ends = torch.isin(completions, torch.tensor(eos or [-1], device=device)).long()
        return ends.cumsum(dim=1) - ends == 0  # up to and including the first end

    def run():
        return int(ours.generate(rows, seen, new, eos=eos, generator=generator)[1].sum())

    def run_theirs():
        settings = {"max_new_tokens": new, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **pad}
        out = theirs.generate(input_ids=ids, attention_mask=mask, num_return_sequences=samples, **settings)
        return int(lengths(out[:, ids.shape[1] :]).sum())

    def differ():
        out, count = ours.generate(ids, mask, new, temperature=0, eos=eos)
        other = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **pad)
        other = other[:, ids.shape[1] :][:, : count.shape[1]]
        return ((out[:, ids.shape[1] :] != other) & count.bool()).any(dim=1).float().mean().item()

    return Case(name, "transformers", run, run_theirs, differ, 0.0, "rows whose greedy completions differ", **options)


def demo(device):
    """-> our decoder, theirs, questions, and a function: questions -> ids and mask."""
    ours = Decoder.from_pretrained(GRPO["model"], device=device)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(GRPO["model"]).to(device), chat.tokenizer_of(ours)
    questions = [problem.question for problem in read_problems(GRPO["held_out"])]
    return ours, theirs, questions, lambda texts: chat.encode_prompts(tokenizer, texts, 64, device=device)


def cases(device, quick):
    logging.set_verbosity_error()
    ours, theirs, questions, encode = demo(device)
    eos = chat.stop_ids(ours)
    for prompts, samples in ((16, 8), (8, 16), (128, 1)):
        what = f"generate, demo, {prompts} prompts × {samples}"
        yield generation(what, ours, theirs, *encode(questions[:prompts]), samples, GRPO["max_new_tokens"], eos)
    yield grpo_step(ours, device)

    # The widths and the vocabulary of Qwen2.5-0.5B; each run takes seconds, so that one pair warms up.
    small, few = {}, {"repeats": 3, "warm": 1}
    if quick:
        small = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    ours, theirs = both(2 if quick else 24, device, **small)
    ids = torch.randint(1000, (8, 32), device=device)
    yield generation("generate, 0.5B, 8 prompts of 32 tokens", ours, theirs, ids, torch.ones_like(ids), 1, 8, **few)
    ours, theirs = both(2, device, **small)
    ids = torch.randint(1000, (1, 512), device=device)
    name = "generate, 2 layers of 0.5B, a group of 8 from 512 tokens"
    yield generation(name, ours, theirs, ids, torch.ones_like(ids), 8, 8, **few)
    ours, _ = both(1, device, **small)
    for frozen in (True, False):
        yield scores(ours, device, frozen, 513, **few)


def scores(model, device, frozen, length, **options):
    """Forward and backward of log π(token), against log_softmax and gather on all logits. Only the layer, or all is trained."""
    model.requires_grad_(True)
    model.model.embed_tokens.requires_grad_(not frozen)
    ids, parameters = torch.randint(1000, (1, length), device=device), [p for p in model.parameters() if p.requires_grad]

    def gradient(logp):
        return torch.autograd.grad(logp.mean(), parameters)

    def run():
        return gradient(model.token_logprobs(ids))

    def plain():
        return gradient(model(ids)[:, :-1].float().log_softmax(dim=-1).gather(-1, ids[:, 1:, None]))

    def differ():
        ours, theirs = (torch.cat([g.flatten() for g in side()]) for side in (run, plain))
        return ((ours - theirs).norm() / theirs.norm()).item()

    name = f"token_logprobs, {length - 1} tokens of {model.config.vocab_size:,}, head {'frozen' if frozen else 'trained'}"
    return Case(name, "log_softmax + gather", run, plain, differ, 1e-4, "relative error of the gradient", **options)


def grpo_step(policy, device, group=8, prompts=8):
    """A whole step of GRPO: sample, score by the reference, loss, gradient, AdamW; the reward costs nothing. They agree in the
    reference's log-probabilities of one rollout."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    reward = lambda texts, **_: [float(len(text) % 7) for text in texts]
    folder = tempfile.mkdtemp()
    trainer = GRPOTrainer(
        model=str(GRPO["model"]),
        reward_funcs=lambda completions, **_: reward(completions),
        args=GRPOConfig(
            output_dir=folder, beta=0.04, num_generations=group, per_device_train_batch_size=group * prompts, loss_type="grpo",
            max_completion_length=GRPO["max_new_tokens"], use_cpu=device == "cpu", bf16=False, report_to=[], save_strategy="no",
            gradient_checkpointing=False, disable_tqdm=True, temperature=1.0,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["1+1="]}),
        processing_class=AutoTokenizer.from_pretrained(GRPO["model"]),
    )  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # which train() would set
    policy, codec = Decoder.from_pretrained(GRPO["model"], device=device), chat.TextCodec(policy)
    reference = Decoder.from_pretrained(GRPO["model"], device=device).requires_grad_(False)
    asked = [problem for problem in read_problems(GRPO["held_out"])[:prompts] for _ in range(group)]
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-6) for model in (policy, trainer.model)]
    generator, limit = torch.Generator(device).manual_seed(0), GRPO["max_new_tokens"]

    def finish(model, optimizer, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def run():
        drawn = rollout.roll_out(policy, codec, asked, limit, 64, generator, temperature=1.0)
        A = adrpo.group_advantages(torch.tensor(reward(drawn.texts), device=device), group, normalize=True)
        ref_logp = rollout.score_all(reference, drawn, len(asked))
        logp = rollout.score(policy, drawn, slice(None))
        finish(policy, optimizers[0], adrpo.policy_loss(logp, logp.detach(), ref_logp, drawn.mask, A, 0.04))
        return int(drawn.mask.sum())

    def run_theirs():
        drawn = trainer._generate_and_score_completions([{"prompt": problem.question} for problem in asked])
        finish(trainer.model, optimizers[1], trainer.compute_loss(trainer.model, drawn))
        return int(drawn["completion_mask"].sum())

    def differ():
        drawn = trainer._generate_and_score_completions([{"prompt": problem.question} for problem in asked])
        ids, mask = (torch.cat([drawn[f"prompt_{x}"], drawn[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        ours = reference.token_logprobs(ids, mask, drawn["prompt_ids"].shape[1])
        return ((ours - drawn["ref_per_token_logps"]) * drawn["completion_mask"]).abs().max().item()

    what = "difference of the reference's log-probabilities, nats"
    return Case(f"GRPO step, demo, {prompts} prompts × {group}", "TRL", run, run_theirs, differ, 1e-4, what)
