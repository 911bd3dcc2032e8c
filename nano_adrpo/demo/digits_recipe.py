"""The recipe of the digits demo: trains its three checkpoints anew, which no run needs (see digits.py).

    python -m nano_adrpo.demo.digits_recipe --out FOLDER        # writes clip/, base/ and judge/; four minutes on one core

Its seeds are fixed: on one machine and version of torch the files come out the same.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from nano_adrpo import files
from nano_adrpo.adrpo import interpolate, squared_error
from nano_adrpo.demo.digits import NUMBERS, Judge, attributes, caption, captions, load
from nano_adrpo.errors import Parser, run_command
from nano_adrpo.files import safetensors
from nano_adrpo.models import clip, mmdit
from nano_adrpo.models.tokenizers import PromptTokenizer
from nano_adrpo.text_to_image import TextToImage
from nano_adrpo.text_to_image.sd3 import PromptEncoder
from nano_adrpo.training.run import new_folder


def train_judge(folder, steps=1500):
    generator = torch.Generator().manual_seed(0)
    images, labels, held = load()
    judge = init(Judge(), generator)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.1)
    for step in steps_of("judge", steps):
        rows = draw(held, 128, generator)
        optimizer_step(optimizer, F.cross_entropy(judge(augment(images[rows], generator)), labels[rows]), step, steps)
    safetensors.save_model(
        folder, judge, {"accuracy_on_other_images": (judge(images[~held]).argmax(1) == labels[~held]).float().mean().item()}
    )


def train_clip(folder, steps=1500):
    generator = torch.Generator().manual_seed(0)
    images, labels, held = load()
    texts = captions(images, labels)
    save_tokenizer(folder)
    files.write_json(Path(folder) / "preprocessor_config.json", {"image_mean": [0.5], "image_std": [0.5]})
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "projection_dim": 32, "hidden_act": "gelu"}
    tokenizer = PromptTokenizer(folder)
    text_config = clip.TextConfig(
        **tower, num_hidden_layers=2, vocab_size=tokenizer.tokenizer.get_vocab_size(), max_position_embeddings=8, eos_token_id=1
    )
    vision_config = clip.VisionConfig(**tower, num_hidden_layers=3, num_channels=1, image_size=8, patch_size=2)
    model = init(clip.CLIP(clip.Config(text_config, vision_config, 32)), generator)
    ids = tokenizer(texts, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5)
    for step in steps_of("clip", steps):
        rows = draw(~held, 128, generator)
        text = F.normalize(model.encode_text(ids[rows]))
        image = F.normalize(model.encode_image(augment(images[rows], generator)))
        logits = model.logit_scale.exp() * image @ text.T  # [B, B]
        same = (ids[rows][:, None] == ids[rows][None]).all(dim=-1).float()  # equal captions are all right answers
        target = same / same.sum(dim=1, keepdim=True)
        optimizer_step(optimizer, (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, step, steps)
    model.save_pretrained(folder)


def train_base(folder, clip_folder, steps=2500):
    generator = torch.Generator().manual_seed(0)
    images, labels, held = load()
    stroke, slant = attributes(images, labels)
    teacher = clip.CLIP.from_pretrained(clip_folder)
    encoder = clip.CLIPText(teacher.config.text_config)
    encoder.text_model, encoder.text_projection = teacher.text_model, teacher.text_projection
    config = mmdit.Config(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        caption_projection_dim=64,
        pos_embed_max_size=4,
    )
    prompts = PromptEncoder([encoder], [PromptTokenizer(clip_folder)], config.joint_attention_dim)
    model = TextToImage(init(mmdit.MMDiT(config), generator), prompts)
    for name, parameter in model.transformer.named_parameters():
        if any(part in name for part in ("norm1", "norm_out", "proj_out")):
            nn.init.zeros_(parameter)  # adaLN-Zero: at the start every block is the identity
    ema = {name: parameter.detach().clone() for name, parameter in model.transformer.named_parameters()}
    # Each image's captions: nothing, its stroke alone, its slant alone. The last row of `condition` is the empty prompt.
    texts = [caption(n, s, l) for n, a, b in zip(labels, stroke, slant) for s, l in ((1, 1), (a, 1), (1, b))]
    distinct = sorted(set(texts)) + [""]
    condition = model.encode(distinct)
    choices = torch.tensor([distinct.index(text) for text in texts]).reshape(-1, 3)  # [1797, 3]
    optimizer = torch.optim.AdamW(model.transformer.parameters(), lr=3e-3, weight_decay=0.01)
    for step in steps_of("base", steps):
        rows = draw(~held, 128, generator)
        texts = choices[rows, torch.randint(3, (128,), generator=generator)]
        texts[torch.rand(128, generator=generator) < 0.1] = len(distinct) - 1  # for classifier-free guidance
        x1, t = images[rows], torch.rand(128, generator=generator)
        x_t, u = interpolate(torch.randn(x1.shape, generator=generator), x1, t)
        optimizer_step(optimizer, squared_error(model.velocity(x_t, t, condition[texts]), u).mean(), step, steps)
        for name, parameter in model.transformer.named_parameters():
            ema[name].lerp_(parameter.detach(), 1 - min(0.998, (step + 1) / (step + 10)))
    model.transformer.load_state_dict(ema, strict=False)
    model.save_pretrained(folder)


def augment(images, generator):
    """Each image shifted by up to one column and noised: 1,198 images are few, and a reward that knows them by heart is a
    poor one (without this the tiny CLIP scores its training images 16 points above others)."""
    shift = torch.randint(3, (len(images),), generator=generator)
    shifted = torch.stack([images.roll(s, dims=3) for s in (-1, 0, 1)])[shift, torch.arange(len(images))]
    return shifted + 0.3 * torch.randn(images.shape, generator=generator)


def save_tokenizer(folder):
    """One token a word, in tokenizer.json's format, with begin and end tokens as CLIP has them."""
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        "<|unknown|>",
        "a",
        "handwritten",
        "thin",
        "bold",
        "upright",
        "slanted",
        *NUMBERS,
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unknown|>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[(word, i) for i, word in enumerate(words[:2])]
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    names = {"bos_token": words[0], "eos_token": words[1], "pad_token": words[1], "unk_token": words[2]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8, **names}
    files.write_json(Path(folder) / "tokenizer_config.json", config)


def init(model, generator):
    """Weights of a model trained from scratch: Xavier for matrices and kernels, N(0, 0.02²) for embeddings, zero biases."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(parameter)
            elif isinstance(module, nn.Embedding) or name == "class_embedding":
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter, generator=generator)
    return model


def draw(mask, count, generator):
    rows = mask.nonzero()[:, 0]
    return rows[torch.randint(len(rows), (count,), generator=generator)]


def optimizer_step(optimizer, loss, step, steps):
    """One optimiser step; the rate falls as a half cosine from its maximum to zero."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group.get("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * 0.5 * (1 + torch.cos(torch.tensor(step / steps * torch.pi)).item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def steps_of(name, steps):
    start = time.time()
    for step in range(steps):
        yield step
        if (step + 1) % (steps // 5) == 0:
            print(f"{name}: step {step + 1}/{steps}, {time.time() - start:.0f} s", flush=True)


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/digits", help="new or empty folder for clip/, base/ and judge/")
    out = new_folder(parser.parse_args().out)
    torch.set_num_threads(1)  # the order of sums, and so the last bit, depends on the number of threads
    train_judge(out / "judge")
    train_clip(out / "clip")
    train_base(out / "base", out / "clip")


if __name__ == "__main__":
    run_command(main)
