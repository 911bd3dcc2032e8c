"""Ready for a GPU, by count: nothing is left on the CPU, the CPU waits once a gradient step, and few operations are launched.

On torch's meta device mixing devices raises as on CUDA. `pytest -m cuda` runs every model and both scripts on a GPU.
"""

import decoder_models
import flow_runs
import grpo_runs
import pytest
import tiny
import tiny_flux
import tiny_sana
import torch
from torch.utils._python_dispatch import _disable_current_modes

import train_flow
import train_grpo
from bench.measure import Operations
from nano_adrpo import adrpo, demo, lora, ode
from nano_adrpo.language import sampling
from nano_adrpo.language.rollout import Rollout, score, score_all
from nano_adrpo.models import clip, flux, mmdit, sana, t5, vae
from nano_adrpo.models.decoder import Decoder
from nano_adrpo.text_to_image import TextToImage
from nano_adrpo.text_to_image.condition import Condition

FLOWS = {
    "sd3": (mmdit.MMDiT, lambda: mmdit.Config(**tiny.MMDIT), tiny.mmdit_inputs),
    "sd3.5": (mmdit.MMDiT, lambda: mmdit.Config(**tiny.MMDIT_STYLES["sd3.5-medium"]), tiny.mmdit_inputs),
    "flux": (flux.Flux, lambda: flux.Config(**tiny_flux.STYLES["flux-dev"]), tiny_flux.inputs),
    "sana": (sana.Sana, lambda: sana.Config(**tiny_sana.TRANSFORMER), tiny_sana.inputs),
}


def flow_step(network, inputs):
    """Euler's step, the reference, Eq. 6 and its gradient. -> the loss, and the adapters' gradients"""
    x0, sigma, *condition = inputs
    times = torch.linspace(0, 1, 3, device=x0.device)
    with torch.no_grad():
        x1 = ode.sample(lambda x, t: -network(x, 1 - t.expand(len(x)), *condition), x0, times)
        with lora.disabled(network):
            v_ref = -network(x0, sigma, *condition)
    A = adrpo.group_advantages(x1.flatten(1).sum(dim=1), len(x1))
    weight, beta = adrpo.adaptive_coefficients(A, 0.5, (-1.0, 1.0))
    x_t, u = adrpo.interpolate(x0, x1, sigma)
    loss = adrpo.flow_loss(-network(x_t, sigma, *condition), u, v_ref, weight, beta)
    loss.backward()
    return loss.detach(), [p.grad for p in network.parameters() if p.requires_grad]


def token_step(policy, ids, start=4):
    """A sampling step of fixed shapes, the reference, Eq. 7 and its gradient. -> the loss, the adapters' gradients, logits"""
    mask = torch.ones_like(ids)
    rollout = Rollout(ids, mask, mask[:, start:], True, [])
    cache = sampling.Cache(policy.config, len(ids), 16, policy.model.embed_tokens.weight)
    with torch.no_grad():
        policy.model(ids, mask, cache)
        cache.fix()
        hidden = policy.model(ids[:, :1], torch.ones_like(ids[:, :1]).expand(-1, 16), cache)
        logits = policy.head(hidden[:, -1])
        probs = sampling.probabilities(logits, 0.7, 5, 0.9)
        sampling.draw(probs, torch.full((len(ids),), 0.5, dtype=torch.float64, device=ids.device))
        with lora.disabled(policy):
            ref_logp = score_all(policy, rollout, 2)
    logp, _ = score(policy, rollout, torch.arange(len(ids), device=ids.device), entropy=True)
    A = adrpo.group_advantages(ref_logp.sum(dim=1), len(ids), normalize=True)
    loss = adrpo.policy_loss(logp, logp.detach(), ref_logp, rollout.mask, A, adrpo.adaptive_beta(A, 0.04, None))
    loss.backward()
    return loss.detach(), [p.grad for p in policy.parameters() if p.requires_grad], logits


def built(cls, config, device, targets):
    torch.manual_seed(0)
    model = tiny.fill(cls(config)).to(device)
    return lora.add(model, targets, 2, 2, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_step_lies_on_one_device_and_waits_for_nothing(name):
    cls, config, inputs = FLOWS[name]
    network, given = built(cls, config(), "meta", ["to_q", "to_v"]), [x.to("meta") for x in inputs()]
    with Operations() as seen:
        loss, gradients = flow_step(network, given)
    assert seen.waits == 0 and {x.device.type for x in (loss, *gradients) if x is not None} == {"meta"}


def test_a_pipelines_sampling_lies_on_one_device():
    policy = TextToImage.from_pretrained(demo.FLOW["model"], device="meta")
    sizes = policy.transformer.config
    condition = Condition(torch.empty(4, 12, sizes.joint_attention_dim), torch.empty(4, sizes.pooled_projection_dim))
    noise = torch.empty(4, *policy.latent_shape, device="meta")
    times = policy.times(3)
    for told, waits in ((condition.to("meta"), 0), (condition, 4)):  # what lies on the CPU is copied once, not at each step
        with Operations() as seen:
            x1 = policy.sample(noise, told, times, negative=told, guidance=2.0, method="heun")
        assert seen.waits == waits and x1.is_meta and policy.decode(x1).is_meta


@pytest.mark.parametrize("family", decoder_models.FAMILIES)
def test_a_decoders_step_lies_on_one_device_and_waits_for_nothing(tmp_path, family):
    decoder_models.folder(tmp_path, family)
    policy = lora.add(Decoder.from_pretrained(tmp_path, device="meta"), lora.DECODER_TARGETS, 2, 2, torch.Generator())
    ids = decoder_models.IDS.to("meta")
    with Operations() as seen:
        loss, gradients, _ = token_step(policy, ids)
    assert seen.waits == 0 and {x.device.type for x in (loss, *gradients)} == {"meta"}


def waits_of_updates(script, monkeypatch, run):
    """How often the CPU would wait for a GPU in the gradient steps of a run."""
    seen, started, described = Operations(), script.set_learning_rate, script.describe
    step, tolist = torch.optim.AdamW.step, torch.Tensor.tolist
    lists = []

    def begin(*args):
        seen.__enter__()
        return started(*args)

    def end(*args):
        seen.__exit__(None, None, None)
        lists.append("end")
        return described(*args)

    def hidden(*args):  # its step counts are tensors that lie on the CPU everywhere
        with _disable_current_modes():
            return step(*args)

    def listed(tensor):  # which the dispatcher does not see
        lists.append("tolist")
        return tolist(tensor)

    monkeypatch.setattr(script, "set_learning_rate", lambda *args: lists.append("begin") or begin(*args))
    monkeypatch.setattr(script, "describe", end)
    monkeypatch.setattr(torch.optim.AdamW, "step", hidden)
    monkeypatch.setattr(torch.Tensor, "tolist", listed)
    run()
    return seen.waits + lists[lists.index("begin") : lists.index("end")].count("tolist")


few_flow, few_grpo = flow_runs.few, grpo_runs.few


@pytest.mark.parametrize("method", train_flow.METHODS)
def test_flow_waits_once_a_gradient_step(few_flow, monkeypatch, method):
    options = ["--inner-steps", 3, "--micro-batch", 1, "--group-size", 4, "--no-eval-first", "--method", method]
    options += flow_runs.NEEDS.get(method, [])
    assert waits_of_updates(train_flow, monkeypatch, lambda: few_flow("run", *options)) == 3


@pytest.mark.parametrize("average", ["sequences", "tokens"])
def test_grpo_waits_once_a_gradient_step(few_grpo, monkeypatch, average):
    options = ["--inner-epochs", 3, "--minibatches", 2, "--micro-batch", 2, "--no-eval-first", "--average", average]
    assert waits_of_updates(train_grpo, monkeypatch, lambda: few_grpo("run", *options)) == 3 * 2


# ------------------------------------------------------------------------------------------------------------------- cuda


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("name", FLOWS)
def test_flow_steps_agree_on_cuda(name, dtype, tolerance):
    cls, config, inputs = FLOWS[name]
    x, sigma, *condition = inputs()
    wide = [x, sigma, *condition]
    narrow = [y if y is sigma or not y.is_floating_point() else y.to(dtype) for y in wide]
    expected, _ = flow_step(built(cls, config(), "cpu", ["to_q", "to_v"]), wide)
    network = built(cls, config(), "cuda", ["to_q", "to_v"])
    for parameter in network.parameters():
        parameter.data = parameter.data if parameter.requires_grad else parameter.data.to(dtype)
    loss, _ = flow_step(network, [y.cuda() for y in narrow])
    torch.testing.assert_close(loss.cpu().float(), expected, rtol=tolerance, atol=tolerance)
    with Operations() as seen:
        flow_step(network, [y.cuda() for y in narrow])
    assert seen.waits == 0


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("family", decoder_models.FAMILIES)
def test_decoders_agree_on_cuda(tmp_path, family, dtype, tolerance):
    decoder_models.folder(tmp_path, family)
    results = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        policy = lora.add(Decoder.from_pretrained(tmp_path, kind, device), lora.DECODER_TARGETS, 2, 2, torch.Generator())
        loss, _, logits = token_step(policy, decoder_models.IDS.to(device))
        results.append(torch.cat([loss.cpu().float().reshape(1), logits.cpu().float().flatten()]))
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance * results[0].abs().max().item())


@pytest.mark.cuda
@pytest.mark.parametrize("steps", ["growing", "fixed", "compiled"])
def test_a_gpu_draws_what_the_cpu_draws(tmp_path, steps):
    """From one generator on the CPU, in float32; rounding may part a row at a token in ten thousand."""
    decoder_models.folder(tmp_path)
    ids = decoder_models.IDS.repeat_interleave(8, dim=0)
    outputs = []
    for device, how in (("cpu", "growing"), ("cuda", steps)):
        model, generator = Decoder.from_pretrained(tmp_path, device=device), torch.Generator().manual_seed(0)
        out, _ = model.generate(ids.to(device), None, 64, generator=generator, steps=how)
        outputs.append(out.cpu())
    assert (outputs[0] == outputs[1]).all(dim=1).float().mean() > 0.9


@pytest.mark.cuda
def test_compiled_scripts_run_on_cuda(few_flow, few_grpo):
    few_flow("flow", "--device", "cuda", "--compile", "--dtype", "bfloat16")
    few_grpo("grpo", "--device", "cuda", "--compile", "--dtype", "bfloat16")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_encoders_and_autoencoders_agree_on_cuda(dtype, tolerance):
    ids, pixels = tiny.clip_inputs()
    z, text = torch.randn(1, 16, 8, 8), torch.randint(3, 80, (2, 9))
    towers = clip.Config(clip.TextConfig(**plain(tiny.CLIP_TEXT)), clip.VisionConfig(**tiny.CLIP_VISION), 24)
    cases = [
        (clip.CLIP(towers), lambda m, x: m.encode_image(x(pixels))),
        (clip.CLIP(towers), lambda m, x: m.encode_text(ids.to(x(z).device))),
        (vae.Autoencoder(vae.Config(**tiny.VAE)), lambda m, x: m.decode(x(z))),
        (t5.T5Encoder(t5.Config(vocab_size=80, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)),
         lambda m, x: m(text.to(x(z).device))),
    ]  # fmt: skip
    for model, run in cases:
        tiny.fill(model, std=0.05)
        with torch.no_grad():
            expected = run(model, lambda x: x)
            found = run(model.to("cuda", dtype), lambda x: x.to("cuda", dtype)).float().cpu()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def plain(config):
    return {key: value for key, value in config.items() if key != "bos_token_id"}
