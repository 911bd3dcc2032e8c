"""Flow transformers, autoencoder and text encoders beside diffusers, peft and transformers, from one folder of weights each."""

import tempfile
from pathlib import Path

import diffusers
import peft
import torch
import transformers

from bench.measure import Case
from nano_adrpo import adrpo, lora
from nano_adrpo.models import clip, mmdit, t5, vae


def opened(theirs, kind, device):
    """A peer's model, and ours from the folder that it writes."""
    folder = Path(tempfile.mkdtemp())
    theirs.save_pretrained(folder)
    return kind.from_pretrained(folder, device=device), theirs.to(device).eval()


def case(name, peer, run, run_theirs, **options):
    """A Case whose sides give tensors."""

    def differ():
        ours, theirs = run(), run_theirs()
        return ((ours - theirs).norm() / theirs.norm()).item()

    return Case(name, peer, run, run_theirs, differ, 1e-4, "relative error of the output", **options)


def cases(device, quick):
    torch.manual_seed(0)
    sizes = {"num_layers": 2 if quick else 6, "attention_head_dim": 64, "num_attention_heads": 8, "sample_size": 32}
    sizes |= {"joint_attention_dim": 512, "caption_projection_dim": 512, "pooled_projection_dim": 256, "pos_embed_max_size": 32}
    ours, theirs = opened(diffusers.SD3Transformer2DModel(**sizes), mmdit.MMDiT, device)
    x, context = torch.randn(4, 16, 32, 32, device=device), torch.randn(4, 154, 512, device=device)
    pooled, sigma = torch.randn(4, 256, device=device), torch.rand(4, device=device)
    yield case("MMDiT forward", "diffusers", lambda: forward(ours, x, sigma, context, pooled),
               lambda: peer_forward(theirs, x, sigma, context, pooled))  # fmt: skip
    yield lora_step(ours, theirs, (x, sigma, context, pooled), device)

    sizes = {"latent_channels": 16, "block_out_channels": (64, 128), "layers_per_block": 2, "norm_num_groups": 32}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    theirs = diffusers.AutoencoderKL(**sizes, **blocks, scaling_factor=1.0, use_quant_conv=False, use_post_quant_conv=False)
    ours, theirs = opened(theirs, vae.Autoencoder, device)
    z = torch.randn(1, 16, 32, 32, device=device)
    yield no_grad("VAE decode", "diffusers", lambda: ours.decode(z), lambda: theirs.decode(z).sample)

    config = transformers.CLIPTextConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=6, projection_dim=512)
    clips = opened(transformers.CLIPTextModelWithProjection(config), clip.CLIPText, device)
    ids = torch.randint(1000, (8, 77), device=device)
    ids[:, -1] = 49407
    yield no_grad("CLIP text encoder", "transformers", lambda: clips[0](ids)[1], lambda: clips[1](ids).text_embeds)

    config = transformers.T5Config(d_model=512, d_kv=64, d_ff=1024, num_heads=8, num_layers=4, feed_forward_proj="gated-gelu")
    t5s = opened(transformers.T5EncoderModel(config), t5.T5Encoder, device)
    ids = torch.randint(1000, (2, 256), device=device)
    yield no_grad("T5 encoder", "transformers", lambda: t5s[0](ids), lambda: t5s[1](ids).last_hidden_state)


def no_grad(name, peer, run, run_theirs):
    return case(name, peer, torch.no_grad()(run), torch.no_grad()(run_theirs))


@torch.no_grad()
def forward(model, x, sigma, context, pooled):
    return model(x, sigma, context, pooled)


@torch.no_grad()
def peer_forward(model, x, sigma, context, pooled):
    return model(x, context, pooled, 1000 * sigma).sample


def lora_step(ours, theirs, inputs, device):
    """A gradient step of ADRPO-FM on adapters of rank 32: reference, policy, Eq. 6, gradient, AdamW."""
    x, sigma, context, pooled = inputs
    lora.add(ours, lora.MMDIT_TARGETS, 32, 32, torch.Generator().manual_seed(0))
    folder = tempfile.mkdtemp()
    lora.save(ours, folder)
    theirs = peft.PeftModel.from_pretrained(theirs, folder, is_trainable=True)
    trained = [[p for p in model.parameters() if p.requires_grad] for model in (ours, theirs)]
    optimizers = [torch.optim.AdamW(parameters, 1e-9) for parameters in trained]
    u, A = torch.randn_like(x), torch.tensor([1.0, -1.0, 0.5, -0.5], device=device)
    weight, beta = adrpo.adaptive_coefficients(A, 1.0, (-1.0, 1.0))

    def finish(loss, optimizer):
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack([loss.detach(), norm])

    def run():
        with torch.no_grad(), lora.disabled(ours):
            v_ref = -ours(x, sigma, context, pooled)
        v = -ours(x, sigma, context, pooled)
        return finish(adrpo.flow_loss(v, u, v_ref, weight, beta), optimizers[0])

    def run_theirs():
        with torch.no_grad(), theirs.disable_adapter():
            v_ref = -theirs(x, context, pooled, 1000 * sigma).sample
        v = -theirs(x, context, pooled, 1000 * sigma).sample
        to_sample, to_reference = ((v - target).square().flatten(1).mean(dim=1) for target in (u, v_ref))
        return finish((weight * to_sample + beta * to_reference).mean(), optimizers[1])

    return case("ADRPO-FM step, adapters of rank 32", "diffusers + peft", run, run_theirs)
