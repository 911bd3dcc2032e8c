"""Pictures from a flow model, text from a decoder; with or without an adapter.

    python -m nano_adrpo.sample --model runs/flow/model --prompt "a bold slanted handwritten three" --count 8 --out three.png
    python -m nano_adrpo.sample --model SD3_FOLDER --adapter runs/sd3/adapter --prompts prompts.txt --out pictures \\
        --steps 28 --guidance 5 --resolution 1024 --device cuda --dtype bfloat16
    python -m nano_adrpo.sample --model QWEN_FOLDER --prompt "What is 12 + 39?" --max-new-tokens 200

--out FILE.png is one grid, a row for each prompt and its samples side by side; any other --out is a folder of single images,
PROMPT_SAMPLE.png, both counted from 0, which `python -m nano_adrpo.evaluate` can score. Text goes to the console.
"""

from pathlib import Path

import torch

from nano_adrpo import chat, images, lora, prompts, runtime, weights
from nano_adrpo.models.decoder import DEFAULTS, Decoder
from nano_adrpo.runtime import positive
from nano_adrpo.text_to_image import TextToImage


def parse(argv=None):
    parser = runtime.Parser(__doc__.split("\n")[0])
    add = parser.add_argument_group("inputs").add_argument
    add("--model", required=True, help="SD3 folder in diffusers' layout, Stability's single file, or a decoder's folder")
    add("--base", help="folder for the parts that --model lacks, as a single file its tokenizers")
    add("--adapter", help="folder in PEFT's layout, made for this model")
    add("--prompt", help="one prompt")
    add("--prompts", help='a file of them: one a line, or JSON lines with "prompt"')
    add = parser.add_argument_group("images").add_argument
    add("--out", help="FILE.png for a grid, else a folder for single images; needed for images")
    add("--steps", type=positive(int), default=28, help="integration steps from noise to image")
    add("--shift", type=positive(float), help="time-grid shift; default the model's own")
    add(
        "--guidance", type=positive(float), default=1.0, help="classifier-free guidance scale; 1 is none, SD3's usual is 5 to 7"
    )
    add("--negative-prompt", default="", help="what guidance leads away from")
    add("--resolution", type=positive(int), help="side in pixels; default the model's own")
    add(
        "--t5",
        choices=("load", "stream", "zeros"),
        default="load",
        help="SD3's T5: at once, layer by layer from disk, without it",
    )
    add("--tile", type=positive(int), help="decode in tiles of so many latent pixels: less memory for large images")
    add = parser.add_argument_group("text").add_argument
    add("--max-new-tokens", type=positive(int), help="tokens of a completion; default 256, or half the model's positions")
    add("--temperature", type=positive(float, zero=True), default=1.0, help="0 is greedy")
    add("--top-k", type=positive(int, zero=True), default=0, help="likeliest tokens kept; 0 keeps all")
    add("--top-p", type=positive(float), default=1.0, help="probability kept; 1 keeps all")
    add = parser.add_argument_group("both").add_argument
    add("--count", type=positive(int), default=1, help="samples of each prompt")
    add("--batch", type=positive(int), default=8, help="samples at a time")
    add("--seed", type=runtime.seed, default=0, help="of noise and tokens")
    add("--device", type=runtime.device, default="cpu", help="torch device")
    add("--dtype", choices=tuple(runtime.DTYPES), help="of weights and computation; default the file's")
    args = parser.parse_args(argv)
    if (args.prompt is None) == (args.prompts is None):
        raise ValueError("--prompt and --prompts: expected one of them")
    return args


def is_decoder(path):
    """Whether a model folder is a decoder language model's; ValueError where it is another model's of transformers."""
    config = Path(path) / "config.json"
    kind = weights.read_json(config).get("model_type") if config.is_file() else None
    if kind not in (None, *DEFAULTS):
        known = f"one of {', '.join(DEFAULTS)}, or a folder in diffusers' SD3 pipeline layout"
        raise ValueError(f"{config}: 'model_type' is {kind!r}; expected {known}")
    return kind is not None


def open_model(args, dtype, device):
    """-> the model without its text encoders, and the shape [C, H, W] of its latents."""
    model = TextToImage.from_pretrained(args.model, dtype, device, args.base, encoders=False)
    if args.adapter:
        lora.load(model.transformer, args.adapter)
    with runtime.about("--resolution"):
        return model, model.latent_shape_at(args.resolution) if args.resolution else model.latent_shape


@torch.no_grad()
def draw_images(args, texts):
    """Yields P · count images [C, H, W] in [−1, 1] as they are drawn, those of one prompt in turn, on the CPU."""
    dtype = runtime.DTYPES[args.dtype] if args.dtype else None
    shape = open_model(args, dtype, "meta")[1]  # what does not fit is told from the headers, before the prompts are encoded
    encoder = prompts.PromptEncoder.from_pretrained(args.model, dtype, args.device, args.base, args.t5)
    condition = encoder.encode([*texts, args.negative_prompt], device="cpu")
    del encoder  # it has gone before the transformer comes
    model, _ = open_model(args, dtype, args.device)
    rows = torch.arange(len(texts)).repeat_interleave(args.count)
    noise = torch.randn(len(rows), *shape, generator=torch.Generator().manual_seed(args.seed))
    times = model.times(args.steps, args.shift)
    for part in torch.arange(len(rows)).split(args.batch):
        negative = condition[torch.full_like(part, -1)]
        latents = model.sample(noise[part].to(args.device), condition[rows[part]], times, negative, args.guidance)
        yield from model.decode(latents, args.tile).float().cpu()
        print(f"{part[-1] + 1}/{len(rows)} images", flush=True)


@torch.no_grad()
def draw_texts(args, texts):
    """-> completions, `count` for each prompt in turn."""
    model = Decoder.from_pretrained(args.model, runtime.DTYPES[args.dtype] if args.dtype else None, args.device)
    if args.adapter:
        lora.load(model, args.adapter)
    with runtime.about(f"--model {args.model}"):
        tokenizer, eos, template = chat.tokenizer_of(model), chat.stop_ids(model), chat.template_of(model)
    asked = [template([{"role": "user", "content": text}]) if template else text for text in texts]
    asked = [text for text in asked for _ in range(args.count)]
    positions = model.config.max_position_embeddings
    new = args.max_new_tokens or min(256, positions // 2)
    if new >= positions:
        raise ValueError(f"--max-new-tokens {new}: expected less than the model's {positions} positions")
    generator, completions = torch.Generator(args.device).manual_seed(args.seed), []
    for start in range(0, len(asked), args.batch):
        ids, mask = chat.encode_prompts(
            tokenizer, asked[start : start + args.batch], positions - new, not template, args.device
        )
        full, seen = model.generate(ids, mask, new, args.temperature, args.top_k, args.top_p, eos=eos, generator=generator)
        completions += chat.decode(tokenizer, full[:, ids.shape[1] :], seen)
    return completions


def main(argv=None):
    args = parse(argv)
    texts = [args.prompt] if args.prompts is None else prompts.read_prompts(args.prompts)
    if is_decoder(args.model):
        if args.out:
            raise ValueError(f"--out {args.out}: expected none, since --model writes text, which goes to the console")
        for index, text in enumerate(draw_texts(args, texts)):
            print(f"> {texts[index // args.count]}\n{text}\n")
        return
    if not args.out:
        raise ValueError("--out: expected FILE.png or a folder, since --model draws images")
    out = Path(args.out)
    if out.suffix == ".png":
        if out.exists():
            raise ValueError(f"--out {out}: the file exists; expected a new one")
        runtime.make_folder(out.parent, out)
        images.write_png(out, images.grid(torch.stack([*draw_images(args, texts)]), columns=args.count))
        return
    runtime.open_run_folder(out)
    for index, image in enumerate(draw_images(args, texts)):
        images.write_png(out / f"{index // args.count:04d}_{index % args.count:02d}.png", image)


if __name__ == "__main__":
    runtime.run(main)
