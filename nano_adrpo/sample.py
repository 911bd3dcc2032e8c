"""Pictures from a flow model, text from a decoder, about a sound if it hears; with or without an adapter.

    python -m nano_adrpo.sample --model runs/flow/model --prompt "a green seven above a red zero" --count 8 --out three.png
    python -m nano_adrpo.sample --model SD3_FOLDER --adapter runs/sd3/adapter --prompts prompts.txt --out pictures \\
        --steps 28 --guidance 5 --resolution 1024 --device cuda --dtype bfloat16
    python -m nano_adrpo.sample --model QWEN_FOLDER --prompt "What is 12 + 39?" --max-new-tokens 200
    python -m nano_adrpo.sample --model QWEN_OMNI_FOLDER --audio dog.wav --prompt "What makes this sound?" --temperature 0

--out FILE.png is one grid, a row for each prompt and its samples side by side; any other --out is a folder of single images,
PROMPT_SAMPLE.png, both counted from 0, which `python -m nano_adrpo.evaluate` can score. Text goes to the console or, with --out
FILE.jsonl, into that file: a JSON object for each completion, with what --prompts has in its row and the "completion".
"""

import json
import math
from pathlib import Path

import torch

from nano_adrpo import files, lora
from nano_adrpo.errors import InputError, Parser, about, run_command, shown
from nano_adrpo.files import png
from nano_adrpo.language import chat
from nano_adrpo.language.audio import AudioCodec
from nano_adrpo.language.rollout import of_rows
from nano_adrpo.models import omni
from nano_adrpo.models.decoder import DEFAULTS
from nano_adrpo.text_to_image import TextToImage, prompts
from nano_adrpo.training import options
from nano_adrpo.training import run as training_run
from nano_adrpo.training.options import positive


def parse(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument_group("inputs").add_argument
    add("--model", required=True, help="image model: folder in diffusers' layout or single file; or a decoder's folder")
    add("--base", help="folder for the parts that --model lacks, as a single file its tokenizers")
    add("--adapter", help="folder in PEFT's layout, made for this model")
    add("--prompt", metavar="TEXT", help="one prompt")
    add(
        "--prompts",
        help='a file of them: .txt with one a line, or JSON (lines), CSV, TSV with "prompt", of text also "question"; for '
        'Qwen2.5-Omni with the path of a sound from there on, "audio"',
    )
    add("--audio", metavar="FILE.wav", help="the sound that --prompt is about, for Qwen2.5-Omni")
    add("--out", help="of images FILE.png for a grid, else a folder for single ones; of text FILE.jsonl, or the console")
    add = parser.add_argument_group("images").add_argument
    add("--steps", type=positive(int), default=28, help="integration steps from noise to image")
    add("--shift", type=positive(float), help="time-grid shift; default the model's own")
    add("--guidance", type=positive(float, zero=True), default=1.0, help="classifier-free guidance scale; up to 1 is none")
    add("--negative-prompt", metavar="TEXT", default="", help="what guidance leads away from")
    add("--resolution", type=positive(int), help="side in pixels; default the model's own")
    add("--t5", choices=("load", "stream", "zeros"), default="load", help="SD3's, FLUX's T5: at once, by layers, without (SD3)")
    options.flag(add, "--lower-case", None, "lower-case the prompts; default as diffusers does it: only for SANA")
    add("--tile", type=positive(int), help="decode in tiles of so many latent pixels: less memory for large images")
    add = parser.add_argument_group("text").add_argument
    add("--max-new-tokens", type=positive(int), help="tokens of a completion; default 256, or half the model's positions")
    add("--temperature", type=positive(float, zero=True), default=1.0, help="0 is greedy")
    add("--top-k", type=positive(int, zero=True), default=0, help="likeliest tokens kept; 0 keeps all")
    add("--top-p", type=positive(float), default=1.0, help="probability kept; 1 keeps all")
    options.chat(add)
    add = parser.add_argument_group("both").add_argument
    add("--count", type=positive(int), default=1, help="samples of each prompt")
    add("--batch", type=positive(int), default=8, help="samples at a time")
    add("--seed", type=options.seed, default=0, help="of noise and tokens")
    add("--device", type=options.device, default="cpu", help="torch device")
    add("--dtype", choices=tuple(options.DTYPES), help="of weights and computation; default the file's")
    args = parser.parse_args(argv)
    if (args.prompt is None) == (args.prompts is None):
        raise InputError("--prompt and --prompts: expected one of them")
    if args.audio and args.prompts:
        raise InputError('--audio: expected only with --prompt; a file of prompts has "audio" beside each')
    if args.audio and model_type(args.model) not in omni.KINDS:
        raise InputError(f"--audio: expected only with Qwen2.5-Omni's folder as --model, not with {args.model}")
    return args


def model_type(path):
    """What config.json of a model folder calls the model; None where there is no such file."""
    config = Path(path) / "config.json"
    return files.read_json(config).get("model_type") if config.is_file() else None


def is_decoder(path):
    """Whether a model folder is a decoder language model's; InputError where it is another model's of transformers."""
    kind, decoders = model_type(path), (*DEFAULTS, *omni.KINDS)
    if kind not in (None, *decoders):
        known = f"one of {', '.join(decoders)}, or a folder in diffusers' pipeline layout"
        raise InputError(f"{Path(path) / 'config.json'}: 'model_type' is {kind!r}; expected {known}")
    return kind is not None


def refuse_idle(args, argv, of_text):
    """Refuses options that have no effect on what the model makes."""
    pictures = "--steps", "--shift", "--guidance", "--negative-prompt", "--resolution", "--t5", "--tile", "--base"
    words = "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--system", "--chat-template", "--thinking", "--stop"
    options.refuse_idle(
        argv,
        (not of_text, "where --model draws images", *pictures, "--lower-case", "--no-lower-case"),
        (of_text, "where --model writes text", *words),
        (args.guidance > 1, "with --guidance above 1", "--negative-prompt"),
        (args.temperature > 0, "with --temperature above 0: the likeliest token is taken", "--top-k", "--top-p"),
    )


def open_model(args, dtype, device):
    """-> the model without its text encoders, and the shape [C, H, W] of its latents."""
    model = TextToImage.from_pretrained(args.model, dtype, device, args.base, encoders=False)
    if args.adapter:
        lora.load(model.transformer, args.adapter)
    with about("--resolution"):
        return model, model.latent_shape_at(args.resolution) if args.resolution else model.latent_shape


def draw_images(args, texts):
    """Yields P · count images [C, H, W] in [−1, 1] as they are drawn, those of one prompt in turn, on the CPU."""
    dtype = options.DTYPES[args.dtype] if args.dtype else None
    headers, shape = open_model(args, dtype, "meta")  # what does not fit is told before the prompts are encoded
    if args.tile and not headers.vae:
        raise InputError(f"--tile: expected only with a model that has an autoencoder, not with {args.model}")
    condition, negative = prompts.cached(
        None, texts, args.negative_prompt, args.model, dtype, args.device, args.base, args.t5, args.lower_case
    )  # the text encoders are gone before the transformer comes
    model, _ = open_model(args, dtype, args.device)
    rows = torch.arange(len(texts)).repeat_interleave(args.count)
    x0 = torch.randn(len(rows), *shape, generator=torch.Generator().manual_seed(args.seed))
    times = model.times(args.steps, args.shift, shape)
    for batch in torch.arange(len(rows)).split(args.batch):
        noise = x0[batch].to(args.device)
        _, images = model.draw(noise, condition[rows[batch]], times, negative, args.guidance, tile=args.tile)
        yield from images
        print(f"{batch[-1] + 1}/{len(rows)} images", flush=True)


def draw_texts(args, texts, sounds):
    """-> completions, `count` for each prompt in turn. sounds: the path of each prompt's sound, or None."""
    model = omni.open_language_model(args.model, options.DTYPES[args.dtype] if args.dtype else None, args.device)
    hears = isinstance(model, omni.Omni)
    if args.adapter:
        lora.load(model, args.adapter)
    with about(f"--model {args.model}"):
        settings = args.system, args.chat_template, args.thinking, args.stop
        codec = (AudioCodec if hears else chat.TextCodec)(model, *settings)
    positions = model.config.positions
    new = args.max_new_tokens or min(256, positions // 2)
    if new >= positions:
        raise InputError(f"--max-new-tokens {new}: expected less than the model's {positions} positions")
    asked = [*zip(texts, sounds)] if hears else texts
    codec.encode(asked, positions - new)  # one that does not fit is told before anything is generated
    prompts = [each for each in asked for _ in range(args.count)]
    generator, completions = torch.Generator(args.device).manual_seed(args.seed), []
    for start in range(0, len(prompts), args.batch):
        some = prompts[start : start + args.batch]
        ids, mask = codec.encode(some, positions - new, args.device)
        sampling = args.temperature, args.top_k, args.top_p, codec.eos, generator, codec.ended
        full, kept = model.generate(ids, mask, new, *sampling, of_rows(codec.clips(some), range(len(some))))
        completions += codec.decode(full[:, ids.shape[1] :], kept)
    return completions


def write_texts(args, rows, texts):
    """Completions to the console, or to --out."""
    if args.out and not args.out.endswith(".jsonl"):
        raise InputError(f"--out {args.out}: expected FILE.jsonl, or none, since --model writes text")
    if args.out:
        check_new(args.out)
    completions = draw_texts(args, texts, sounds_of(args, rows))
    if args.out:
        found = [{**rows[index // args.count], "completion": text} for index, text in enumerate(completions)]
        files.write_bytes(args.out, "".join(json.dumps(each) + "\n" for each in found).encode())
        return
    for index, text in enumerate(completions):
        print(shown(f"> {texts[index // args.count]}\n{text}\n", math.inf, keep="\n\t"))


def sounds_of(args, rows):
    """The path of each prompt's sound, or None."""
    if args.audio:
        return [args.audio]
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("audio"), str | None):
            raise InputError(f"{args.prompts}, prompt {number}: key 'audio' is {row['audio']!r}; expected the path of a sound")
    return [str(Path(args.prompts or "").parent / row["audio"]) if row.get("audio") else None for row in rows]


def check_new(out):
    """Refuses a file of --out that exists or cannot be written."""
    if Path(out).exists():
        raise InputError(f"--out {out}: the file exists; expected a new one")
    training_run.make_folder(Path(out).parent, out)


def main(argv=None):
    args = parse(argv)
    of_text = is_decoder(args.model)
    refuse_idle(args, argv, of_text)
    names = (*prompts.NAMES, "question") if of_text else prompts.NAMES
    rows = [{"prompt": args.prompt}] if args.prompts is None else prompts.read_rows(args.prompts, names)
    texts = [row["prompt"] for row in rows]
    if of_text:
        write_texts(args, rows, texts)
        return
    if not args.out:
        raise InputError("--out: expected FILE.png or a folder, since --model draws images")
    out = Path(args.out)
    if out.suffix == ".png":
        check_new(out)
        png.write_png(out, png.grid(torch.stack([*draw_images(args, texts)]), columns=args.count))
        return
    training_run.new_folder(out)
    for index, image in enumerate(draw_images(args, texts)):
        png.write_png(out / f"{index // args.count:04d}_{index % args.count:02d}.png", image)


if __name__ == "__main__":
    run_command(main)
