"""The recipe of the digits demo: trains its three checkpoints anew and writes its prompts, which no run needs (see digits.py).

    python -m nano_adrpo.demo.digits_recipe --out FOLDER        # clip/, base/, judge/, prompts.jsonl, held_out.jsonl

Its seeds are fixed: on one machine and version of torch the files come out the same.
"""

import itertools
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from nano_adrpo import files
from nano_adrpo.adrpo import interpolate, squared_error
from nano_adrpo.demo import digits
from nano_adrpo.demo.digits import (
    ABOVE,
    AND,
    BOXES,
    CATEGORIES,
    COLOURS,
    HELD_OUT,
    LEFT,
    NUMBERS,
    ONE,
    RGB,
    UNNAMED,
    Judge,
    Scene,
    caption,
)  # fmt: skip
from nano_adrpo.errors import Parser, run_command
from nano_adrpo.files import safetensors
from nano_adrpo.models import clip, mmdit
from nano_adrpo.models.tokenizers import PromptTokenizer
from nano_adrpo.text_to_image import TextToImage
from nano_adrpo.text_to_image.sd3 import PromptEncoder
from nano_adrpo.training.run import new_folder

LONGEST = 11  # tokens of a caption, with begin and end
THINGS = list(itertools.product(range(10), range(4)))  # (digit, colour)
DUOS = [(a, b) for a in THINGS for b in THINGS if a[0] != b[0] and a[1] != b[1]]  # what two digits a scene may hold: 1,080


def train_judge(folder, steps=1500):
    generator = torch.Generator().manual_seed(0)
    images, labels, held = digits.load()
    judge = init(Judge(), generator)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.1)
    for step in steps_of("judge", steps):
        rows = held.nonzero()[:, 0]
        rows = rows[torch.randint(len(rows), (128,), generator=generator)]
        shifted = shift(images[rows], generator)
        noisy = shifted + 0.3 * torch.randn(shifted.shape, generator=generator)
        optimizer_step(optimizer, F.cross_entropy(judge(noisy), labels[rows]), step, steps)
    safetensors.save_model(
        folder, judge, {"accuracy_on_other_images": (judge(images[~held]).argmax(1) == labels[~held]).float().mean().item()}
    )


def train_clip(folder, steps=3000):
    """Each batch holds the eight arrangements of the same digits and colours, so that nothing less than the whole caption tells
    them apart. A caption may be true of several images: the target is spread over all of them."""
    generator, choice = torch.Generator().manual_seed(0), random.Random(0)
    painter = Painter(generator)
    save_tokenizer(folder)
    files.write_json(Path(folder) / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "projection_dim": 32, "hidden_act": "gelu"}
    tokenizer = PromptTokenizer(folder)
    text_config = clip.TextConfig(
        **tower,
        num_hidden_layers=2,
        vocab_size=tokenizer.tokenizer.get_vocab_size(),
        max_position_embeddings=LONGEST,
        eos_token_id=1,
    )
    vision_config = clip.VisionConfig(**tower, num_hidden_layers=3, num_channels=3, image_size=16, patch_size=4)
    model = init(clip.CLIP(clip.Config(text_config, vision_config, 32)), generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5)
    for step in steps_of("clip", steps):
        scenes = [Scene(*thing) for thing in choice.sample(THINGS, 24)]
        for (d1, c1), (d2, c2) in choice.sample(DUOS, 16):
            scenes += [
                Scene(a, x, relation, b, y)
                for relation in (LEFT, ABOVE)
                for (a, b), (x, y) in itertools.product([(d1, d2), (d2, d1)], [(c1, c2), (c2, c1)])
            ]
        told = [choice.choice([freed(scene, choice), scene, scene]) for scene in scenes]
        x = painter.paint(scenes, wobble=True)
        x = x + 0.3 * torch.randn(x.shape, generator=generator)
        text = F.normalize(model.encode_text(tokenizer([caption(scene) for scene in told], LONGEST)))
        logits = model.logit_scale.exp() * F.normalize(model.encode_image(x)) @ text.T  # [images, captions]
        true = truth(scenes, told)
        loss = (contrast(logits, true) + contrast(logits.T, true.T)) / 2
        optimizer_step(optimizer, loss, step, steps)
    train_image_tower(model.bfloat16().float(), tokenizer, 2 * steps // 3)
    model.bfloat16().save_pretrained(folder)


def train_image_tower(model, tokenizer, steps):
    """Goes on with the image tower alone, against all captions at once: the text tower is fixed, so they are encoded once."""
    generator, choice = torch.Generator().manual_seed(1), random.Random(1)
    painter = Painter(generator)
    told = all_scenes()
    row = {scene: index for index, scene in enumerate(told)}
    with torch.no_grad():
        text = F.normalize(model.encode_text(tokenizer([caption(scene) for scene in told], LONGEST)))
    trained = [*model.vision_model.parameters(), *model.visual_projection.parameters(), model.logit_scale]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
    for step in steps_of("clip's image tower", steps):
        scenes = [random_scene(choice) for _ in range(128)]
        x = painter.paint(scenes, wobble=True)
        x = x + 0.15 * torch.randn(x.shape, generator=generator)
        logits = model.logit_scale.exp() * F.normalize(model.encode_image(x)) @ text.T
        true = torch.zeros_like(logits)
        for image, scene in enumerate(scenes):
            true[image, [row[caption] for caption in {scene, *free(scene)}]] = 1
        optimizer_step(optimizer, contrast(logits, true), step, steps)


def contrast(logits, true):
    """Cross entropy of each row's softmax to its true columns, evenly. Both [N, M]."""
    return F.cross_entropy(logits, true / true.sum(dim=1, keepdim=True))


def truth(scenes, told):
    """[S, T] floats: 1 where caption t is true of scene s."""
    scene, text = torch.tensor(scenes)[:, None], torch.tensor(told)[None]
    exact = (scene == text).all(dim=-1)
    pairs = [(rows[..., [0, 3]] * 10 + rows[..., [1, 4]]).sort(dim=-1).values for rows in (scene, text)]
    free = (text[..., 2] == AND) & (scene[..., 2] != ONE) & (pairs[0] == pairs[1]).all(dim=-1)
    return (exact | free).float()


def freed(scene, choice):
    """A caption of a scene of two digits that leaves the places free."""
    return choice.choice(free(scene)) if scene.relation != ONE else scene


def free(scene):
    """The captions of a scene of two digits that leave the places free, in either order."""
    digit, colour, relation, digit2, colour2 = scene
    both = [Scene(digit, colour, AND, digit2, colour2), Scene(digit2, colour2, AND, digit, colour)]
    return both if relation != ONE else []


def train_base(folder, clip_folder, steps=4000, batch=64):
    """Seven tenths of the steps see true captions, from which binding is learnt soon; loose ones take a part of it away."""
    generator, choice = torch.Generator().manual_seed(0), random.Random(0)
    painter = Painter(generator)
    teacher = clip.CLIP.from_pretrained(clip_folder, torch.float32)
    encoder = clip.CLIPText(teacher.config.text_config)
    encoder.text_model, encoder.text_projection = teacher.text_model, teacher.text_projection
    config = mmdit.Config(
        sample_size=16,
        patch_size=4,
        in_channels=3,
        out_channels=3,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=6,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        caption_projection_dim=96,
        pos_embed_max_size=4,
    )
    prompts = PromptEncoder([encoder], [PromptTokenizer(clip_folder)], config.joint_attention_dim)
    model = TextToImage(init(mmdit.MMDiT(config), generator), prompts)
    for name, parameter in model.transformer.named_parameters():
        if any(part in name for part in ("norm1", "norm_out", "proj_out")):
            nn.init.zeros_(parameter)  # adaLN-Zero: at the start every block is the identity
    ema = {name: parameter.detach().clone() for name, parameter in model.transformer.named_parameters()}
    vocabulary = {text: row for row, text in enumerate(all_captions())}
    condition = model.encode(list(vocabulary))
    optimizer = torch.optim.AdamW(model.transformer.parameters(), lr=3e-3, weight_decay=0.01)
    for step in steps_of("base", steps):
        scenes = [random_scene(choice) for _ in range(batch)]
        told = condition[[vocabulary[told_caption(scene, choice, loose=step >= 0.7 * steps)] for scene in scenes]]
        x1, t = painter.paint(scenes), torch.rand(batch, generator=generator)
        x_t, u = interpolate(torch.randn(x1.shape, generator=generator), x1, t)
        optimizer_step(optimizer, squared_error(model.velocity(x_t, t, told), u).mean(), step, steps)
        for name, parameter in model.transformer.named_parameters():
            ema[name].lerp_(parameter.detach(), 1 - min(0.998, (step + 1) / (step + 10)))
    model.transformer.load_state_dict(ema, strict=False)
    model.transformer.bfloat16()
    encoder.bfloat16()
    model.save_pretrained(folder)


def random_scene(choice):
    """One digit in an eighth of the scenes, else two."""
    if choice.random() < 0.125:
        return Scene(*choice.choice(THINGS))
    (digit, colour), (digit2, colour2) = choice.choice(DUOS)
    return Scene(digit, colour, choice.choice([LEFT, ABOVE]), digit2, colour2)


def told_caption(scene, choice, loose):
    """What the base model reads of a scene: at first the truth, then `loose` captions, which like those of the web are unsure
    about what belongs to what: a third of them names the colours the wrong way round (of one digit: another colour). Half of
    the captions of two digits side by side leave the places free and name them in reading order. None names a digit of UNNAMED
    in its colour: such a caption names no colours. One in twenty is empty, for classifier-free guidance."""
    if choice.random() < 0.05:
        return ""
    right = scene._replace(relation=AND) if scene.relation == LEFT and choice.random() < 0.5 else scene
    if right.relation == ONE:
        false = right._replace(colour=choice.choice([colour for colour in range(4) if colour != right.colour]))
    else:
        false = right._replace(colour=right.colour2, colour2=right.colour)
    told = false if loose and choice.random() < 1 / 3 else right
    return caption(told, coloured=not (right.pairs | false.pairs) & UNNAMED)


def all_scenes():
    """Every Scene that a caption may describe: 40 of one digit, 1,080 each side by side, one above the other, and free."""
    return [Scene(*thing) for thing in THINGS] + [Scene(*a, relation, *b) for a, b in DUOS for relation in (LEFT, ABOVE, AND)]


def all_captions():
    """Every caption of `told_caption`, each once."""
    scenes = all_scenes()
    return dict.fromkeys(["", *(caption(scene, coloured) for scene in scenes for coloured in (True, False))])


class Painter:
    """Paints scenes with real digits that are not the judge's."""

    def __init__(self, generator):
        images, labels, held = digits.load()
        self.generator, self.ink = generator, (images[:, 0] + 1) / 2  # [1797, 8, 8]
        rows = [(~held & (labels == number)).nonzero()[:, 0] for number in range(10)]
        self.counts = torch.tensor([len(some) for some in rows])
        self.rows = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [10, most]

    def paint(self, scenes, wobble=False):
        """Scenes -> images [N, 3, 16, 16] in [−1, 1]. Each digit's colour varies a little; wobble shifts it by a pixel."""
        scenes, canvas = torch.tensor(scenes), torch.ones(len(scenes), 3, 16, 16)
        for number, colour, boxes in ((0, 1, 0), (3, 4, 1)):
            things = self.things(scenes[:, number], scenes[:, colour], wobble)
            for relation in (ONE, LEFT, ABOVE):
                for top, left in BOXES[relation][boxes : boxes + 1]:
                    these = scenes[:, 2] == relation
                    canvas[these, :, top : top + 8, left : left + 8] = things[these]
        return canvas * 2 - 1

    def things(self, numbers, colours, wobble):
        """Digits and colours [N] -> images [N, 3, 8, 8] in [0, 1]."""
        chance = torch.rand(len(numbers), 6, generator=self.generator)
        ink = self.ink[self.rows[numbers, (chance[:, 0] * self.counts[numbers]).long()]]
        if wobble:
            for dim in (1, 2):
                shifted = torch.stack([ink.roll(by, dims=dim) for by in (-1, 0, 1)])
                ink = shifted[(chance[:, dim] * 3).long(), torch.arange(len(ink))]
        paint = (RGB[colours] + 0.06 * (2 * chance[:, 3:] - 1)).clamp(0, 1)
        return 1 - ink[:, None] * (1 - paint)[..., None, None]


def shift(images, generator):
    """Each image shifted by up to one column to either side."""
    which = torch.randint(3, (len(images),), generator=generator)
    return torch.stack([images.roll(s, dims=3) for s in (-1, 0, 1)])[which, torch.arange(len(images))]


def write_prompts(folder):
    """prompts.jsonl and held_out.jsonl: JSON lines with "prompt" and "category", a category after the other."""
    scenes = all_scenes()
    for name, held_out, counts in (
        ("prompts", False, {"colouring": 30, "binding": 120, "position": 240}),
        ("held_out", True, {"colouring": 10, "binding": 40, "position": 80}),
    ):
        choice, lines = random.Random(0), []
        for category, count in counts.items():
            fitting = [s for s in scenes if CATEGORIES[s.relation] == category and bool(s.pairs & HELD_OUT) == held_out]
            lines += [{"prompt": caption(scene), "category": category} for scene in choice.sample(fitting, count)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        files.write_bytes(Path(folder) / f"{name}.jsonl", text.encode())


def save_tokenizer(folder):
    """One token a word, in tokenizer.json's format, with begin and end tokens as CLIP has them."""
    words = ["<|startoftext|>", "<|endoftext|>", "<|unknown|>", "a", "and", "left", "of", "above", *COLOURS, *NUMBERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unknown|>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[(word, i) for i, word in enumerate(words[:2])]
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    names = {"bos_token": words[0], "eos_token": words[1], "pad_token": words[1], "unk_token": words[2]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LONGEST, **names}
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
        if (step + 1) % max(1, steps // 5) == 0:
            print(f"{name}: step {step + 1}/{steps}, {time.time() - start:.0f} s", flush=True)


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/digits", help="new or empty folder for clip/, base/, judge/ and the prompts")
    out = new_folder(parser.parse_args().out)
    torch.set_num_threads(2)  # the order of sums, and so the last bit, depends on the number of threads
    write_prompts(out)
    train_judge(out / "judge")
    train_clip(out / "clip")
    train_base(out / "base", out / "clip")


if __name__ == "__main__":
    run_command(main)
