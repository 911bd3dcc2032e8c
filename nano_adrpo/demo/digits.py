"""Handwritten digits: the data, the captions, the judge and the recipes of the flow demo.

    python -m nano_adrpo.demo.digits --out FOLDER        # trains the three checkpoints anew

The 1,797 real 8 × 8 digits of the UCI test set (attribution: DIGITS.md beside this file). Two attributes are measured from the
pixels: stroke (how much ink) and slant (how far the top leans to the right). Within each digit the lowest third is called thin
or upright, the highest third bold or slanted, and the middle third nothing. Captions read "a bold slanted handwritten three".

  clip/    a tiny CLIP, trained on full captions. It is the reward, and its text tower encodes the base model's prompts.
  base/    an SD3-shaped pixel-space model (MMDiT, CLIP text encoder), trained on captions with at most one attribute, so that
           prompts with two leave room for alignment to improve
  judge/   a digit classifier that no reward sees, trained on other images than both of the above

CLIP and base see two thirds of the images, the judge the other third.
"""

import itertools
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from nano_adrpo import metrics, runtime, weights
from nano_adrpo.adrpo import interpolate, squared_error
from nano_adrpo.models import clip, mmdit
from nano_adrpo.prompts import PromptEncoder, PromptTokenizer
from nano_adrpo.text_to_image import TextToImage

HERE = Path(__file__).parent
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
STROKES, SLANTS = ["thin", "", "bold"], ["upright", "", "slanted"]
PROMPTS = [f"a {stroke} {slant} handwritten {n}" for n, stroke, slant in itertools.product(NUMBERS, STROKES[::2], SLANTS[::2])]

# --------------------------------------------------------------------------------------------------------------------- data


def load():
    """images [1797, 1, 8, 8] in [−1, 1], labels [1797], and which rows belong to the judge [1797] (every third)."""
    checkpoint = weights.Checkpoint(HERE / "digits.safetensors")
    images = checkpoint.read("images")[:, None].float() / 8 - 1
    return images, checkpoint.read("labels").long(), torch.arange(len(images)) % 3 == 2


def ink_and_slant(images):
    """images [N, 1, 8, 8] in [−1, 1] -> ink [N], the mean darkness in 0 … 1, and slant [N], the shear of the ink's second
    moments: columns to the right per row upwards."""
    ink = (images[:, 0].clamp(-1, 1) + 1) / 2  # [N, 8, 8]
    total = ink.sum(dim=(1, 2)).clamp(min=1e-6)[:, None, None]
    axis = torch.arange(8.0)
    x, y = axis[None, None, :].expand_as(ink), axis[None, :, None].expand_as(ink)
    dx = x - (ink * x).sum(dim=(1, 2), keepdim=True) / total
    dy = y - (ink * y).sum(dim=(1, 2), keepdim=True) / total
    return ink.mean(dim=(1, 2)), -(ink * dx * dy).sum(dim=(1, 2)) / (ink * dy * dy).sum(dim=(1, 2)).clamp(min=1e-6)


def attributes(images, labels):
    """The third, 0 (thin, upright), 1 or 2 (bold, slanted), of its digit's real images that each image's ink and slant
    fall in: two [N]."""
    real, real_labels, _ = load()
    found = []
    for measure, reference in zip(ink_and_slant(images), ink_and_slant(real)):
        bounds = torch.stack([reference[real_labels == n].quantile(torch.tensor([1 / 3, 2 / 3])) for n in range(10)])  # [10, 2]
        found.append((measure[:, None] >= bounds[labels]).sum(dim=1))
    return found


def caption(number, stroke, slant):
    return " ".join(word for word in ("a", STROKES[stroke], SLANTS[slant], "handwritten", NUMBERS[number]) if word)


def captions(images, labels):
    """Every image's full caption, a list of N strings."""
    return [caption(*row) for row in zip(labels, *attributes(images, labels))]


# -------------------------------------------------------------------------------------------------------------------- judge


class Judge(nn.Module):
    """What the reward does not see: a digit classifier, the two attributes measured from the pixels, real images."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.hidden, self.out = nn.Linear(32 * 16, 32), nn.Linear(32, 10)

    def features(self, images):
        """[N, 1, 8, 8] -> [N, 32]."""
        return F.relu(self.hidden(F.relu(self.conv2(F.relu(self.conv1(images)))).flatten(1)))

    def forward(self, images):
        """[N, 1, 8, 8] -> logits [N, 10]."""
        return self.out(self.features(images))

    @classmethod
    def from_pretrained(cls, path):
        with torch.device("meta"):
            model = cls()
        return weights.load(model, weights.Checkpoint(path))

    @torch.no_grad()
    def evaluate(self, images, prompts):
        """Metrics of N generated images [N, 1, 8, 8] and their prompts (captions of this file), by name:

        digit, stroke, slant, joint   shares of samples with that attribute right, and with all three right
        frechet                       squared Fréchet distance to real two-attribute images, in `features`
        out_of_range                  share of pixels beyond [−1, 1] by more than 0.1
        """
        wanted = torch.tensor([_meaning(prompt) for prompt in prompts])  # [N, 3]
        digit = self(images).argmax(dim=1) == wanted[:, 0]
        stroke, slant = (
            (found == third) | (third == 1)  # the middle third has no word, so nothing was asked for
            for found, third in zip(attributes(images, wanted[:, 0]), wanted[:, 1:].T)
        )
        real, labels, _ = load()
        both = torch.stack([third != 1 for third in attributes(real, labels)]).all(dim=0)
        return {
            "joint": (digit & stroke & slant).float().mean().item(),
            "digit": digit.float().mean().item(),
            "stroke": stroke.float().mean().item(),
            "slant": slant.float().mean().item(),
            "frechet": metrics.frechet_distance(self.features(images), self.features(real[both])),
            "out_of_range": (images.abs() > 1.1).float().mean().item(),
        }


def _meaning(prompt):
    for meaning in itertools.product(range(10), range(3), range(3)):
        if caption(*meaning) == prompt:
            return meaning
    raise ValueError(f"the prompt {prompt!r} is not a digit caption; expected one like {PROMPTS[0]!r}")


# ------------------------------------------------------------------------------------------------------------------ recipes


def train_judge(folder, steps=1500):
    generator = torch.Generator().manual_seed(0)
    images, labels, held = load()
    judge = init(Judge(), generator)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.1)
    for step in _progress("judge", steps):
        rows = _draw(held, 128, generator)
        _step(optimizer, F.cross_entropy(judge(augment(images[rows], generator)), labels[rows]), step, steps)
    weights.save_model(
        folder, judge, {"accuracy_on_other_images": (judge(images[~held]).argmax(1) == labels[~held]).float().mean().item()}
    )


def train_clip(folder, steps=1500):
    generator = torch.Generator().manual_seed(0)
    images, labels, held = load()
    texts = captions(images, labels)
    save_tokenizer(folder)
    weights.write_json(Path(folder) / "preprocessor_config.json", {"image_mean": [0.5], "image_std": [0.5]})
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "projection_dim": 32, "hidden_act": "gelu"}
    tokenizer = PromptTokenizer(folder)
    text_config = clip.TextConfig(
        **tower, num_hidden_layers=2, vocab_size=tokenizer.tokenizer.get_vocab_size(), max_position_embeddings=8, eos_token_id=1
    )
    vision_config = clip.VisionConfig(**tower, num_hidden_layers=3, num_channels=1, image_size=8, patch_size=2)
    model = init(clip.CLIP(clip.Config(text_config, vision_config, 32)), generator)
    ids = tokenizer(texts, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5)
    for step in _progress("clip", steps):
        rows = _draw(~held, 128, generator)
        text = F.normalize(model.encode_text(ids[rows]))
        image = F.normalize(model.encode_image(augment(images[rows], generator)))
        logits = model.logit_scale.exp() * image @ text.T  # [B, B]
        same = (ids[rows][:, None] == ids[rows][None]).all(dim=-1).float()  # equal captions are all right answers
        target = same / same.sum(dim=1, keepdim=True)
        _step(optimizer, (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2, step, steps)
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
    average = {name: parameter.detach().clone() for name, parameter in model.transformer.named_parameters()}
    # Each image's captions: nothing, its stroke alone, its slant alone. The last row of `condition` is the empty prompt.
    texts = [caption(n, s, l) for n, a, b in zip(labels, stroke, slant) for s, l in ((1, 1), (a, 1), (1, b))]
    distinct = sorted(set(texts)) + [""]
    condition = model.encode(distinct)
    choices = torch.tensor([distinct.index(text) for text in texts]).reshape(-1, 3)  # [1797, 3]
    optimizer = torch.optim.AdamW(model.transformer.parameters(), lr=3e-3, weight_decay=0.01)
    for step in _progress("base", steps):
        rows = _draw(~held, 128, generator)
        texts = choices[rows, torch.randint(3, (128,), generator=generator)]
        texts[torch.rand(128, generator=generator) < 0.1] = len(distinct) - 1  # for classifier-free guidance
        x1, t = images[rows], torch.rand(128, generator=generator)
        x_t, u = interpolate(torch.randn(x1.shape, generator=generator), x1, t)
        _step(optimizer, squared_error(model.velocity(x_t, t, condition[texts]), u).mean(), step, steps)
        for name, parameter in model.transformer.named_parameters():
            average[name].lerp_(parameter.detach(), 1 - min(0.998, (step + 1) / (step + 10)))
    model.transformer.load_state_dict(average, strict=False)
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
    weights.write_json(Path(folder) / "tokenizer_config.json", config)


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


def _draw(mask, count, generator):
    rows = mask.nonzero()[:, 0]
    return rows[torch.randint(len(rows), (count,), generator=generator)]


def _step(optimizer, loss, step, steps):
    """One optimiser step; the rate falls as a half cosine from its maximum to zero."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group.get("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * 0.5 * (1 + torch.cos(torch.tensor(step / steps * torch.pi)).item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _progress(name, steps):
    start = time.time()
    for step in range(steps):
        yield step
        if (step + 1) % (steps // 5) == 0:
            print(f"{name}: step {step + 1}/{steps}, {time.time() - start:.0f} s", flush=True)


def main():
    parser = runtime.Parser(__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/digits", help="new or empty folder for clip/, base/ and judge/")
    out = runtime.open_run_folder(parser.parse_args().out)
    torch.set_num_threads(1)  # the order of sums, and so the last bit, depends on the number of threads
    train_judge(out / "judge")
    train_clip(out / "clip")
    train_base(out / "base", out / "clip")


if __name__ == "__main__":
    runtime.run(main)
