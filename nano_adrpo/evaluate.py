"""The paper's Table 1 and Figure 3 for any set of models: rewards, diversities, divergence; a table, trade-offs, images.

    python -m nano_adrpo.evaluate --models base=nano_adrpo/demo/base tuned=runs/flow/model
    python -m nano_adrpo.evaluate --models base=SD3 adrpo@20=SD3+runs/sd3/round-20/adapter adrpo@40=SD3+runs/sd3/adapter \\
        flux=PNGS --prompts prompts.txt --rewards clip_score:CLIP pick_score:PICKSCORE aesthetic:CLIP --steps 28 \\
        --guidance 5 --device cuda --dtype bfloat16 --batch 8 --out runs/table1
    python -m nano_adrpo.evaluate --models base=QWEN tuned=QWEN+runs/grpo/adapter --problems test.jsonl --out runs/table2

A model is NAME=MODEL or NAME=MODEL+ADAPTER or, of any other system, NAME=FOLDER of PNG images, any number of them a prompt (see
evaluation/image_folders.py for which belongs to which). NAME@STEP is one checkpoint of a run: the table has the last, the
picture all. A name (or name and step) given again is another training run of the same method. The first model is the reference,
from which W2 (within its family) or the KL is measured. All start from the same random numbers. With --problems they are
language models.

Written to --out: table.md and results.json (mean ± standard error over training runs, and in brackets that over the noises or,
of language models, over the problems), reward_….png, and of images side_by_side.png, images/ and, with --worst, failures/, of
language models completions/. An evaluation that was interrupted goes on where it stopped: what has been scored is not looked at
again, so a model or reward that changed on disk needs another --out.
"""

import contextlib
import functools
import json
import math
import re
from pathlib import Path

from nano_adrpo import files, lora, rewards
from nano_adrpo.demo import FLOW
from nano_adrpo.errors import InputError, Parser, about, run_command
from nano_adrpo.evaluation import image_folders, plots, tables, text
from nano_adrpo.evaluation.entries import Results, entries
from nano_adrpo.evaluation.failures import write_worst
from nano_adrpo.evaluation.images import evaluate, evenly, score
from nano_adrpo.files.png import write_png
from nano_adrpo.language.chat import TextCodec
from nano_adrpo.models.omni import open_language_model
from nano_adrpo.rewards import images as image_rewards
from nano_adrpo.rewards import text as text_rewards
from nano_adrpo.text_to_image import TextToImage, prompts
from nano_adrpo.training import options
from nano_adrpo.training.life import Life
from nano_adrpo.training.options import DTYPES, device, flag, positive
from nano_adrpo.training.run import new_folder


def image_name(prompt, sample):
    return f"{prompt:04d}_{sample:02d}.png"


def parse(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument_group("what").add_argument
    models = "NAME[@STEP]=MODEL, MODEL+ADAPTER or a folder of images; the first is the reference"
    add("--models", nargs="+", required=True, help=models)
    add("--rewards", nargs="+", help="NAME:FOLDER[@WEIGHT] …, see nano_adrpo/rewards; default the demo's, of text exact")
    add("--judge", help="FILE.py:FUNCTION of more metrics, see nano_adrpo/evaluation; default: none, or the demo's")
    add("--samples", type=positive(int), default=8, help="images per prompt, at least 2, or completions per problem")
    images = parser.add_argument_group("images")
    add = images.add_argument
    formats = '.txt with a prompt a line, or JSON (lines), CSV, TSV with "prompt"'
    add("--prompts", help=f"{formats}; default: the demo's held-out ones, with its judge")
    add("--images", metavar="FILE", help='CSV with "file,prompt": which image of a folder belongs to which prompt')
    add("--base", help="folder for the parts that a MODEL lacks, as a single file its tokenizers")
    real = "folder of real images, any number: clip_frechet is the distance of CLIP's image embeddings to theirs"
    add("--reference-images", metavar="FOLDER", help=real)
    add("--worst", type=positive(int, zero=True), default=0, help="images with the least of each reward, kept in failures/")
    add("--clip-diversity", choices=("normalized", "projected"), default="normalized", help="projected seems the paper's scale")
    add("--seeds", type=positive(int), default=3, help="noises, from 0; 0 is the training script's evaluation")
    add("--steps", type=positive(int), default=8, help="Euler steps from noise to image; SD3's and FLUX's usual is 28")
    add("--shift", type=positive(float), help="time-grid shift; default the model's own")
    add("--guidance", type=positive(float, zero=True), default=1.0, help="classifier-free guidance scale; up to 1 is none")
    add("--negative-prompt", metavar="TEXT", default="", help="what guidance leads away from")
    add("--resolution", type=positive(int), help="side in pixels; default the model's own")
    t5 = "SD3's and FLUX's T5: at once, layer by layer from disk, without it (SD3 alone)"
    add("--t5", choices=("load", "stream", "zeros"), default="load", help=t5)
    flag(add, "--lower-case", None, "lower-case the prompts; default as diffusers does it: only for SANA")
    words = parser.add_argument_group("text")
    add = words.add_argument
    add("--problems", help="JSON lines, see train_grpo.py; the models are language models")
    add("--instruction", metavar="TEXT", default="", help="text put behind every question")
    add("--few-shot", help="file of text put before every question; rewards and judges do not see it")
    options.chat(add)
    add("--max-new-tokens", type=positive(int), default=256, help="tokens of a completion, its end included")
    add("--max-prompt-tokens", type=positive(int), default=2048, help="a longer prompt is refused")
    add("--temperature", type=positive(float, zero=True), default=1.0, help="0 is greedy")
    add("--top-k", type=positive(int, zero=True), default=0, help="likeliest tokens kept; 0 keeps all")
    add("--top-p", type=positive(float), default=1.0, help="probability kept; 1 keeps all")
    add = parser.add_argument_group("run").add_argument
    add("--out", default="runs/evaluation", help="folder for the results, where an earlier evaluation goes on")
    add("--batch", type=positive(int), help="images or completions at a time; default all images, 256 completions")
    add("--device", type=device, default="cpu", help="torch device")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="of weights and computation; rewards are float32")
    args = parser.parse_args(argv)
    of_text = args.problems is not None
    for action in (images if of_text else words)._group_actions:  # they have no effect, so they are refused and not stored
        if getattr(args, action.dest) != action.default:
            raise InputError(f"{action.option_strings[0]}: expected only {'without' if of_text else 'with'} --problems")
        delattr(args, action.dest)
    refuse_idle(args, argv, of_text)
    if of_text:
        args.rewards = args.rewards or ["exact"]
        if "choice" in [rewards.weighted(spec)[0] for spec in args.rewards]:
            raise InputError("--rewards choice: expected another one, since these problems have no choices")
        if args.top_p > 1:
            raise InputError(f"--top-p {args.top_p}: expected at most 1")
        return args
    if args.samples < 2:
        raise InputError("--samples 1: expected at least 2, to compare images of one prompt")
    args.rewards = args.rewards or FLOW["reward"]
    if not args.prompts:
        args.prompts, args.judge = FLOW["held_out"], args.judge or FLOW["judge"]
    return args


def refuse_idle(args, argv, of_text):
    """Refuses options that have no effect on what is measured."""
    options.refuse_idle(
        argv,
        (not of_text or args.temperature > 0, "with --temperature above 0: the likeliest token is taken", "--top-k", "--top-p"),
        (of_text or args.guidance > 1, "with --guidance above 1", "--negative-prompt"),
    )


def open_results(args, found, changed):
    """-> the Results of the entries in --out. changed: what config.json has of some options, {name: value}."""
    free = ("models", "out", "device", "batch")  # may differ from call to call; models have results of their own
    if not (Path(args.out) / "config.json").is_file():
        new_folder(args.out)
    results = Results(args.out, found)
    results.open({name: value for name, value in vars(args).items() if name not in free} | changed)
    return results


# Options that say how a model draws, and their defaults.
DRAWING = {"shift": None, "guidance": 1.0, "resolution": None, "t5": "load", "base": None, "lower_case": None}


class Evaluation:
    """Of images: the models, prompts, rewards and judge of a command line, and the folder with what has been measured."""

    def __init__(self, args):
        self.args, self.entries = args, entries(args.models)
        self.reference = self.entries[0]
        self.prompts = prompts.read_prompts(args.prompts)
        self.texts = [prompt.text for prompt in self.prompts]
        with about("--judge"):
            self.judge = rewards.function(args.judge) if args.judge else None
        self.reward = image_rewards.parse(args.rewards)
        if args.clip_diversity != "normalized" and not self.reward.embeds:
            raise InputError("--clip-diversity: expected only with a reward of CLIP's, whose embeddings it is measured with")
        if args.reference_images and not self.reward.embeds:
            raise InputError("--reference-images: expected only with a reward of CLIP's, whose embeddings are compared")
        self.real_images = image_folders.real_images(args.reference_images) if args.reference_images else []
        self.last = {}  # of each model the title of its last step
        for entry in sorted(self.entries, key=lambda entry: entry.step or 0):
            self.last[entry.name] = entry.title
        self.out, self.dtype = Path(args.out), DTYPES[args.dtype]
        self.loaded = {}  # of the reference and of the current entry: what `load` gives
        self.space = {}  # of each model: its family and its latents' shape. W2 means something where these are the same
        self.check()
        self.results = open_results(args, self.entries, {"prompts": [list(prompt) for prompt in self.prompts]})

    def check(self):
        """Checks file names and headers, so that errors come before long work."""
        first, images_only, spaces = None, {}, {}
        folders = [entry for entry in self.entries if image_folders.is_images(entry.model)]
        if self.args.images and not folders:
            raise InputError("--images: expected only with a folder of images among --models")
        if len(folders) == len(self.entries) and (
            idle := [name for name in DRAWING if getattr(self.args, name) != DRAWING[name]]
        ):
            raise InputError(f"--{idle[0].replace('_', '-')}: expected only with a model among --models, which draws")
        for entry in self.entries:
            is_images = image_folders.is_images(entry.model)
            if images_only.setdefault(entry.name, is_images) != is_images:
                raise InputError(f"--models {entry.what}: {entry.name} is images and a model; expected one of them to a name")
            if is_images:
                for seed in range(self.seeds(entry)):
                    image_folders.files_of(entry.model, seed, self.texts, self.args.images)
                continue
            model = TextToImage.from_pretrained(entry.model, self.dtype, "meta", self.args.base, encoders=False)
            prompts.check_t5(entry.model, self.args.base, self.args.t5)
            if entry.adapter:
                lora.load(model.transformer, entry.adapter)
            shape = self.shape(model)
            image = [3 if model.vae else shape[0], *(side * model.factor for side in shape[1:])]
            first = first or (entry.what, image)
            if image != first[1]:
                raise InputError(f"--models {entry.what}: images {image}; expected {first[1]}, those of {first[0]}")
            self.space[entry] = spaces.setdefault(entry.name, (model.family.name, shape))
            if self.space[entry] != (model.family.name, shape):
                raise InputError(f"--models {entry.what}: {entry.name} is of two families; expected one to a name")

    def seeds(self, entry):
        return image_folders.seeds(entry.model, self.args.seeds) if image_folders.is_images(entry.model) else self.args.seeds

    def shape(self, model):
        """[C, H, W] of its latents."""
        with about("--resolution"):
            return model.latent_shape_at(self.args.resolution) if self.args.resolution else model.latent_shape

    def load(self, entry):
        """-> TextToImage, the Condition of all prompts, the Condition of the negative one."""
        if entry not in self.loaded:
            args = self.args
            self.loaded = {kept: model for kept, model in self.loaded.items() if kept == self.reference}
            file = self.out / "embeddings" / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', entry.model)}.safetensors"
            condition, negative = prompts.cached(
                file, self.texts, args.negative_prompt, entry.model, self.dtype, args.device, args.base, args.t5,
                args.lower_case,
            )  # fmt: skip
            model = TextToImage.from_pretrained(entry.model, self.dtype, args.device, args.base, encoders=False)
            if entry.adapter:
                lora.load(model.transformer, entry.adapter)
            self.loaded[entry] = model, condition, negative
        return self.loaded[entry]

    @functools.cached_property
    def real(self):
        """CLIP's embeddings of the real images, or None."""
        if not self.real_images:
            return None
        found = image_folders.embeddings(self.real_images, self.reward, self.args.device)
        fewest, width = min(len(found), len(self.texts) * self.args.samples), found.shape[1]
        if fewest <= width:
            few = f"--reference-images: {len(found)} real images, {len(self.texts) * self.args.samples} of a model"
            print(f"{few}; with no more than {width}, the embeddings' width, clip_frechet is too high", flush=True)
        return found

    def measure(self, entry, seed):
        """-> {metric: number} of one model with one noise, and of each prompt its images [samples, C, H, W], on the CPU."""
        args, normalize = self.args, self.args.clip_diversity == "normalized"
        categories = [prompt.category for prompt in self.prompts]
        if image_folders.is_images(entry.model):
            found = image_folders.files_of(entry.model, seed, self.texts, args.images)
            counts = [len(some) for some in found]
            texts, kinds = ([x for x, count in zip(some, counts) for _ in range(count)] for some in (self.texts, categories))
            images = image_folders.read_images([file for some in found for file in some])
            samples = counts[0] if len(set(counts)) == 1 else counts
            values, _, _ = score(
                images, texts, samples, self.reward, self.judge, args.device, args.batch, normalize, categories=kinds,
                real=self.real,
            )  # fmt: skip
            known = {metric: value for metric, value in values.items() if not math.isnan(value)}  # one image has no diversity
            return known, images.split(counts)
        model, condition, negative = self.load(entry)
        shape = self.shape(model)
        values, _, images, *_ = evaluate(
            model, condition, self.texts, self.reward, self.judge,
            self.reference_velocity if self.space[entry] == self.space.get(self.reference) else None,
            shape=shape, times=model.times(args.steps, args.shift, shape), negative=negative, guidance=args.guidance,
            categories=categories,
            samples=args.samples, seed=seed, batch=args.batch, device=args.device, normalize=normalize,
            real=self.real,
        )  # fmt: skip
        return values, images.split(args.samples)

    def reference_velocity(self, x, t, rows):
        model, condition, _ = self.load(self.reference)
        return model.velocity(x, t, condition[rows])

    def measured(self, entry, seed):
        """Measures, and keeps images of some prompts and, of the last step, the worst ones."""
        with about(f"--models {entry.what}"):
            values, images = self.measure(entry, seed)
        if seed == entry.run == 0:
            folder = self.out / "images" / entry.title
            folder.mkdir(parents=True, exist_ok=True)
            for row in evenly(len(self.prompts), 10):
                for sample, image in enumerate(images[row]):
                    write_png(folder / image_name(row, sample), image)
            if self.args.worst and entry.title == self.last[entry.name]:
                kept = self.out / "failures" / entry.title
                write_worst(kept, images, self.texts, self.reward, self.args.worst, self.args.device, self.args.batch)
        return values

    def rows(self):
        return self.results.rows(self.seeds, self.measured)

    def report(self, rows):
        """Draws the pictures. -> {what was counted: number}, and a line that says what the table's numbers are"""
        draw_trade_offs(rows, ("clip_diversity", "pixel_diversity", "w2"), self.out)
        side_by_side(self, self.out / "side_by_side.png")
        counts = {"prompts": len(self.prompts), "seeds": self.args.seeds}
        images = f"{counts['prompts']} prompts × {self.args.samples} images"
        return counts, f"{images}, {counts['seeds']} seeds, mean ± standard error over training runs (over noises)."


class TextEvaluation:
    """Of completions: the models, problems, rewards and judge of a command line, and the folder with what has been measured."""

    def __init__(self, args):
        self.args, self.entries, self.dtype = args, entries(args.models), DTYPES[args.dtype]
        few_shot = files.read_text(args.few_shot) if args.few_shot else ""
        needed_by = text_rewards.needs_answers(args.rewards)
        self.problems = text_rewards.read_problems(args.problems, args.instruction, few_shot, needed_by)
        with about("--judge"):
            self.judge = text_rewards.own(rewards.function(args.judge)) if args.judge else None
        self.batch = args.batch or 256
        self.vocabularies = {entry: self.check(entry) for entry in self.entries}
        self.reward = text_rewards.parse(
            args.rewards, args.device, min(self.batch, 16), system=args.system, thinking=args.thinking
        )
        self.loaded = {}  # the reference's and the current entry's model and codec
        self.results = open_results(args, self.entries, {"problems": [problem.prompt for problem in self.problems]})

    def open(self, entry, where):
        """-> the Decoder on a device, with the entry's adapter, and its codec."""
        args = self.args
        with about(f"--models {entry.what}"):
            model = open_language_model(entry.model, self.dtype, where)
            codec = TextCodec(model, args.system, args.chat_template, args.thinking, args.stop)
            if entry.adapter:
                lora.load(model, entry.adapter)
            return model.requires_grad_(False), codec

    def check(self, entry):
        """Checks headers, and every prompt's length, so that errors come before long work. -> the ids of its tokens"""
        model, codec = self.open(entry, "meta")
        with about(f"--models {entry.what}, --max-prompt-tokens {self.args.max_prompt_tokens}"):
            ids, _ = codec.encode([problem.prompt for problem in self.problems], self.args.max_prompt_tokens)
        longest, limit = ids.shape[1], model.config.positions
        if longest + self.args.max_new_tokens > limit:
            behind = f"--max-new-tokens {self.args.max_new_tokens} behind a prompt of {longest}"
            raise InputError(f"--models {entry.what}: {behind} exceeds the model's {limit} positions")
        return codec.tokenizer.get_vocab()

    def load(self, entry):
        if entry not in self.loaded:
            self.loaded = {kept: model for kept, model in self.loaded.items() if kept == self.entries[0]}
            self.loaded[entry] = self.open(entry, self.args.device)
        return self.loaded[entry]

    def measure(self, entry, seed):
        """-> {metric: number, "errors": {metric: standard error}} of one model."""
        args, first, model, codec = self.args, self.entries[0], *self.load(entry)
        alike = self.vocabularies[entry] == self.vocabularies[first]  # a KL needs the same tokens
        reference = functools.partial(contextlib.nullcontext, self.load(first)[0]) if alike else None
        with about(f"--models {entry.what}"):
            values, errors, texts = text.evaluate(
                model, codec, self.problems, self.reward, self.judge, reference, samples=args.samples, seed=seed,
                max_new_tokens=args.max_new_tokens, longest=args.max_prompt_tokens, batch=self.batch, score_batch=self.batch,
                temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, score_temperature=args.temperature or 1.0,
            )  # fmt: skip
        asked = [str(problem) for problem in self.problems for _ in range(args.samples)]
        pairs = [{"question": question, "completion": completion} for question, completion in zip(asked, texts)]
        (self.results.out / "completions").mkdir(exist_ok=True)
        file = self.results.out / "completions" / f"{entry.title}.{entry.run}.jsonl"
        files.write_bytes(file, "".join(json.dumps(pair) + "\n" for pair in pairs).encode())
        return {**values, "errors": errors}

    def rows(self):
        return self.results.rows(lambda entry: 1, self.measure)

    def report(self, rows):
        """Draws the pictures. -> {what was counted: number}, and a line that says what the table's numbers are"""
        draw_trade_offs(rows, ("entropy", "kl_k1"), self.results.out)
        counts = {"problems": len(self.problems), "samples": self.args.samples}
        completions = f"{counts['problems']} problems × {counts['samples']} completions"
        return counts, f"{completions}, mean ± standard error over training runs (over problems)."


def draw_trade_offs(rows, metrics, out):
    for x in metrics:
        if all(x in row["final"] for row in rows):
            plots.pictures(rows, x, ("reward",), out / f"reward_{x}.png")


def side_by_side(evaluation, file):
    """As the paper's Figure 2: a row per prompt, a panel per model, with up to four images of each prompt."""
    panels, rows = {}, evenly(len(evaluation.prompts), 10)
    for name in dict.fromkeys(entry.name for entry in evaluation.entries):
        folder = evaluation.out / "images" / evaluation.last[name]
        count = min(4, *(len(list(folder.glob(f"{row:04d}_*.png"))) for row in rows))
        names = [image_name(row, sample) for row in rows for sample in range(count)]
        panels[name] = image_folders.read_images([folder / name for name in names])
    plots.grids(file, panels, [evaluation.texts[row] for row in rows])


def main(argv=None):
    args = parse(argv)
    evaluation, out = TextEvaluation(args) if "problems" in args else Evaluation(args), Path(args.out)
    with Life() as life:
        life.lock(out, ".lock")
        rows = evaluation.rows()
    counts, line = evaluation.report(rows)
    files.write_json(out / "results.json", {**counts, "rows": tables.as_json(rows)})
    table = f"{line}\n\n{tables.table(rows)}"
    files.write_bytes(out / "table.md", table.encode())
    print(table)
    return {row["setting"]: row["final"] for row in rows}


if __name__ == "__main__":
    run_command(main)
