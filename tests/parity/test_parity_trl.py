"""GRPO's loss, its gradient and its advantages against TRL's GRPOTrainer, run by TRL's own code from the rewards to the loss:
it scores a given rollout (old and reference log-probabilities, advantages), the policy moves, it computes the loss. Ours starts
from the same token ids, rewards and saved weights, in our decoder. TRL's default multiplies the KL by the ratio, which GRPO's
paper and ours do not: the option that switches it off is set, and the last test says what the default does. Needs the extra
`parity`."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen3Config
from trl import GRPOConfig, GRPOTrainer

import nano_adrpo
from nano_adrpo import adrpo
from nano_adrpo.models.decoder import Decoder

TOKENIZER = Path(nano_adrpo.__file__).parent / "demo" / "arithmetic_base"  # 24 tokens; 0 pads, 1 ends
SIZES = dict(
    vocab_size=24, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    pad_token_id=0, bos_token_id=None, eos_token_id=1,
)  # fmt: skip
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False),
}
G, BETA = 4, 0.3
PROMPTS = [[5, 6, 7], [8, 9], [5, 10, 11, 12, 4]]  # one a group; TRL pads them on the left
LENGTHS = [1, 6, 3, 4, 5, 2, 2, 6, 4, 4, 1, 3]
REWARDS = [0.0, 1.0, 0.25, 1.0, 0.5, 0.5, 0.5, 0.5, -3.0, 2.0, 2.0, 2.0001]  # the second group has no spread


def draw(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def move(model, seed, step):
    """Other weights: old policy, policy and reference must differ."""
    generator = draw(seed)
    for parameter in model.parameters():
        parameter.add_(step * torch.randn(parameter.shape, generator=generator))


def trainer_at(folder, name, loss_type, **options):
    """A GRPOTrainer whose policy and reference are the model saved in folder/reference, and the completions it is to score."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    move(model, 1, 0.1)
    model.save_pretrained(folder / "reference")
    completions = [torch.randint(2, 24, (length,), generator=draw(i)).tolist() for i, length in enumerate(LENGTHS)]
    prompts, zeros = [PROMPTS[i // G] for i in range(len(LENGTHS))], [[0.0] * length for length in LENGTHS]
    args = GRPOConfig(
        output_dir=str(folder / "out"), loss_type=loss_type, beta=BETA, epsilon=0.2, scale_rewards="group", num_generations=G,
        per_device_train_batch_size=len(LENGTHS), num_iterations=2, max_completion_length=8, use_cpu=True, bf16=False,
        report_to=[], save_strategy="no", gradient_checkpointing=False, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=str(folder / "reference"),
        reward_funcs=lambda completions, **_: REWARDS,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["1+1="]}),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
        rollout_func=lambda *_: {"prompt_ids": prompts, "completion_ids": completions, "logprobs": zeros},
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # which train() would set
    return trainer, completions


def batch(completions):
    """Prompts padded on the left, completions on the right: ids, mask [12, 11], and where completions start."""
    width, longest = max(map(len, PROMPTS)), max(LENGTHS)
    ids, mask = torch.zeros(2, len(LENGTHS), width + longest, dtype=torch.long)
    for i, completion in enumerate(completions):
        row = PROMPTS[i // G] + completion
        start = width - len(PROMPTS[i // G])
        ids[i, start : start + len(row)], mask[i, start : start + len(row)] = torch.tensor(row), 1
    return ids, mask, width


def assert_gradients_agree(ours, theirs):
    ours, theirs = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert ours.keys() == theirs.keys() and max(p.grad.abs().max() for p in theirs.values()) > 0.1
    differ = {key: (ours[key].grad - theirs[key].grad).abs().max().item() for key in ours}
    assert max(differ.values()) < 2e-5, differ


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("loss_type, average", [("grpo", "sequences"), ("bnpo", "tokens")])
def test_advantages_loss_and_gradient_agree(tmp_path, name, loss_type, average):
    trainer, completions = trainer_at(tmp_path, name, loss_type, use_bias_correction_kl=False)
    move(trainer.model, 2, 0.03)
    trainer.model.save_pretrained(tmp_path / "old")
    scored = trainer._generate_and_score_completions([{"prompt": "1+1="}] * len(LENGTHS))
    move(trainer.model, 3, 0.03)
    trainer.model.save_pretrained(tmp_path / "policy")
    expected = trainer.compute_loss(trainer.model, scored)
    expected.backward()

    ids, mask, start = batch(completions)
    reference, old, policy = (Decoder.from_pretrained(tmp_path / folder) for folder in ("reference", "old", "policy"))
    with torch.no_grad():
        ref_logp, old_logp = (model.token_logprobs(ids, mask, start) for model in (reference, old))
    logp, mask = policy.token_logprobs(ids, mask, start), mask[:, start:]
    advantages = adrpo.group_advantages(torch.tensor(REWARDS), G, normalize=True)
    loss = adrpo.policy_loss(logp, old_logp, ref_logp, mask, advantages, BETA, clip_eps=0.2, average=average)
    loss.backward()

    torch.testing.assert_close(advantages, scored["advantages"], atol=1e-6, rtol=1e-5)
    assert advantages[4:8].tolist() == [0.0] * 4
    # Both clips and the KL are at work, and the other average would be another loss: the agreement could have failed.
    ratio, better = (logp - old_logp).detach().exp(), (advantages > 0)[:, None]
    assert ((ratio > 1.2) & better & (mask == 1)).any() and ((ratio < 0.8) & (advantages < 0)[:, None] & (mask == 1)).any()
    other = {"sequences": "tokens", "tokens": "sequences"}[average]
    for change in ({"average": other}, {"clip_eps": 10.0}, {"kl": "k2"}, {"kl": "k1"}):
        setting = {"clip_eps": 0.2, "average": average} | change
        assert abs(adrpo.policy_loss(logp, old_logp, ref_logp, mask, advantages, BETA, **setting) - expected) > 1e-3
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert_gradients_agree(policy, trainer.model)


def test_trls_default_follows_our_k2_while_the_policy_is_the_one_that_sampled(tmp_path):
    # use_bias_correction_kl, on by default in 1.16, multiplies k3 by the ratio. At ratio 1 the slope of ratio·k3 in log π is
    # k3 + 1 − r = −log r, which is k2's.
    trainer, completions = trainer_at(tmp_path, "qwen3", "grpo", use_bias_correction_kl=True)
    move(trainer.model, 2, 0.03)
    trainer.model.save_pretrained(tmp_path / "policy")
    scored = trainer._generate_and_score_completions([{"prompt": "1+1="}] * len(LENGTHS))
    trainer.compute_loss(trainer.model, scored).backward()

    ids, mask, start = batch(completions)
    policy = Decoder.from_pretrained(tmp_path / "policy")
    logp = policy.token_logprobs(ids, mask, start)
    ref_logp = Decoder.from_pretrained(tmp_path / "reference").token_logprobs(ids, mask, start)
    advantages = adrpo.group_advantages(torch.tensor(REWARDS), G, normalize=True)
    adrpo.policy_loss(logp, logp, ref_logp, mask[:, start:], advantages, BETA, kl="k2").backward()
    assert_gradients_agree(policy, trainer.model)
