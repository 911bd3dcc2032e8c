"""The paper's Table 1 and Figure 3 for any set of models: rewards, diversities, divergence; a table, trade-offs, images.

    python -m nano_adrpo.evaluate --models base=nano_adrpo/demo/base tuned=runs/flow/model
    python -m nano_adrpo.evaluate --models base=SD3 adrpo@20=SD3+runs/sd3/round-20/adapter adrpo@40=SD3+runs/sd3/adapter \\
        flux=PNGS --prompts prompts.txt --rewards clip_score:CLIP pick_score:PICKSCORE aesthetic:CLIP --steps 28 \\
        --guidance 5 --device cuda --dtype bfloat16 --batch 8 --out runs/table1

A model is NAME=MODEL or NAME=MODEL+ADAPTER or, of any other system, NAME=FOLDER of images PROMPT_SAMPLE.png, both counted from
0 (0007_03.png), in seed0/, seed1/, … if there are several seeds. NAME@STEP is one checkpoint of a run: the table has the last,
the picture all. A name (or name and step) given again is another training run of the same method. The first model is the
reference, from which W2 is measured. All models start from the same noises.

Written to --out: table.md and results.json (mean ± standard error, over training runs where a model has several, else over the
seeds of the noise), reward_….png, side_by_side.png, and images/. An evaluation that was interrupted goes on where it stopped:
what has been scored is not looked at again, so a model or reward that changed on disk needs another --out.
"""

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch

from nano_adrpo import files, lora, rewards
from nano_adrpo.demo import FLOW
from nano_adrpo.errors import InputError, MissingFile, Parser, about, run_command
from nano_adrpo.evaluation import plots, tables
from nano_adrpo.evaluation.images import evaluate, score
from nano_adrpo.files.png import read_png, write_png
from nano_adrpo.rewards.images import parse as parse_rewards
from nano_adrpo.text_to_image import TextToImage, prompts
from nano_adrpo.training.options import DTYPES, device, positive
from nano_adrpo.training.run import new_folder


class Entry(NamedTuple):
    """One model of --models."""

    name: str
    step: int | None
    what: str  # as on the command line
    model: str
    adapter: str | None
    run: int  # counts the entries of one name and step

    @property
    def title(self):
        return self.name if self.step is None else f"{self.name}@{self.step}"

    @property
    def is_images(self):
        """Whether it is images of another system, not a model (whose folder may show some, as SD3's does)."""
        path = Path(self.model)
        return (
            path.is_dir()
            and not (path / "transformer").is_dir()
            and any(next(folder.glob("*.png"), None) for folder in (path, path / "seed0"))
        )

    def seeds(self, wanted):
        """How many seeds it has: of images in one folder, one."""
        return 1 if self.is_images and not (Path(self.model) / "seed0").is_dir() else wanted

    def image_files(self, seed, count, samples):
        """The files of one seed's images of `count` prompts, those of one prompt contiguous."""
        folder = Path(self.model)
        folder = folder / f"seed{seed}" if (folder / "seed0").is_dir() else folder
        return [folder / image_name(row, sample) for row in range(count) for sample in range(samples)]


def image_name(prompt, sample):
    return f"{prompt:04d}_{sample:02d}.png"


def parse(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument_group("what").add_argument
    models = "NAME[@STEP]=MODEL, MODEL+ADAPTER or a folder of images; the first is the reference"
    add("--models", nargs="+", required=True, help=models)
    add("--base", help="folder for the parts that a MODEL lacks, as a single file its tokenizers")
    add("--prompts", help="one prompt a line, or JSON lines with \"prompt\"; default: the demo's 40, with the demo's judge")
    add("--rewards", nargs="+", default=FLOW["reward"], help="NAME:FOLDER[@WEIGHT] …, see nano_adrpo/rewards")
    add("--judge", help="FILE.py:FUNCTION of more metrics, see nano_adrpo/evaluation/images.py; default: none with --prompts")
    add("--clip-diversity", choices=("normalized", "projected"), default="normalized", help="projected has the paper's scale")
    add = parser.add_argument_group("sampling").add_argument
    add("--seeds", type=positive(int), default=3, help="noises, from 0; 0 is the training script's evaluation")
    add("--samples", type=positive(int), default=8, help="images per prompt, at least 2")
    add("--steps", type=positive(int), default=10, help="Euler steps from noise to image; SD3's usual is 28")
    add("--shift", type=positive(float), help="time-grid shift; default the model's own")
    add("--guidance", type=positive(float), default=1.0, help="classifier-free guidance scale; 1 is none")
    add("--negative-prompt", default="", help="what guidance leads away from")
    add("--resolution", type=positive(int), help="side in pixels; default the model's own")
    t5 = "SD3's T5: at once, layer by layer from disk, without it"
    add("--t5", choices=("load", "stream", "zeros"), default="load", help=t5)
    add = parser.add_argument_group("run").add_argument
    add("--out", default="runs/evaluation", help="folder for the results, where an earlier evaluation goes on")
    add("--batch", type=positive(int), help="images at a time; default all")
    add("--device", type=device, default="cpu", help="torch device")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="of weights and computation; rewards are float32")
    args = parser.parse_args(argv)
    if args.samples < 2:
        raise InputError("--samples 1: expected at least 2, to compare images of one prompt")
    if not args.prompts:
        args.prompts, args.judge = FLOW["prompts"], args.judge or FLOW["judge"]
    return args


def entries(specs):
    """--models -> [Entry]."""
    found = []
    for spec in specs:
        match = re.fullmatch(r"([^=@/]+)(?:@(\d+))?=(.+)", spec)
        if not match:
            raise InputError(f"--models {spec!r}: expected NAME=MODEL, NAME=MODEL+ADAPTER or NAME@STEP=…")
        name, step, what = match[1], match[2] and int(match[2]), match[3]
        model, _, adapter = (what, "", "") if Path(what).exists() else what.rpartition("+")
        for path in filter(None, (model or what, adapter)):
            if not Path(path).exists():
                raise MissingFile(f"--models {spec!r}: {path}: no such file or folder")
        run = sum((entry.name, entry.step) == (name, step) for entry in found)
        found.append(Entry(name, step, what, model, adapter or None, run))
    return found


class Evaluation:
    """The models, prompts, rewards and judge of a command line, and the folder with what has been measured."""

    def __init__(self, args):
        self.args, self.entries = args, entries(args.models)
        self.reference = self.entries[0]
        self.prompts = prompts.read_prompts(args.prompts)
        with about("--judge"):
            self.judge = rewards.function(args.judge) if args.judge else None
        self.reward = parse_rewards(args.rewards)
        self.out, self.dtype = Path(args.out), DTYPES[args.dtype]
        self.loaded = {}  # of the reference and of the current entry: what `load` gives
        self.check()
        self.open()

    def check(self):
        """Checks file names and headers, so that errors come before long work."""
        first, images_only = None, {}
        for entry in self.entries:
            if images_only.setdefault(entry.name, entry.is_images) != entry.is_images:
                raise InputError(f"--models {entry.what}: {entry.name} is images and a model; expected one of them to a name")
            if entry.is_images:
                for seed in range(entry.seeds(self.args.seeds)):
                    wanted = entry.image_files(seed, len(self.prompts), self.args.samples)
                    if missing := next((file for file in wanted if not file.is_file()), None):
                        raise MissingFile(f"{missing}: no such file; expected {self.args.samples} images of every prompt")
                continue
            model = TextToImage.from_pretrained(entry.model, self.dtype, "meta", self.args.base, encoders=False)
            if entry.adapter:
                lora.load(model.transformer, entry.adapter)
            shape = self.shape(model)
            first = first or (entry.what, shape)
            if shape != first[1]:
                raise InputError(
                    f"--models {entry.what}: latents {list(shape)}; expected {list(first[1])}, those of {first[0]}"
                )

    def open(self):
        """Creates the folder, or continues the evaluation in it; refuses the folder of another evaluation."""
        free = ("models", "out", "device", "batch")  # may differ from call to call; models have results of their own
        options = {name: value for name, value in vars(self.args).items() if name not in free} | {"prompts": self.prompts}
        config = self.out / "config.json"
        if config.is_file():
            for name, value in files.read_json(config).items():
                if value != options.get(name):
                    other = f"--{name.replace('_', '-')} ({textwrap.shorten(repr(value), 80)})"
                    raise InputError(f"--out {self.out}: holds an evaluation with another {other}")
        else:
            new_folder(self.out)
            files.write_json(config, options)
        (self.out / "scores").mkdir(exist_ok=True)

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
                file, self.prompts, args.negative_prompt, entry.model, self.dtype, args.device, args.base, args.t5
            )
            model = TextToImage.from_pretrained(entry.model, self.dtype, args.device, args.base, encoders=False)
            if entry.adapter:
                lora.load(model.transformer, entry.adapter)
            self.loaded[entry] = model, condition, negative
        return self.loaded[entry]

    def measure(self, entry, seed):
        """-> {metric: number} of one model with one noise, and its images [P · samples, C, H, W], on the CPU."""
        args, normalize = self.args, self.args.clip_diversity == "normalized"
        if entry.is_images:
            texts = [prompt for prompt in self.prompts for _ in range(args.samples)]
            images = read_images(entry.image_files(seed, len(self.prompts), args.samples))
            values, _ = score(images, texts, args.samples, self.reward, self.judge, args.device, args.batch, normalize)
            return values, images
        model, condition, negative = self.load(entry)
        values, images, _ = evaluate(
            model, condition, self.prompts, self.reward, self.judge,
            None if self.reference.is_images else self.reference_velocity,
            shape=self.shape(model), times=model.times(args.steps, args.shift), negative=negative, guidance=args.guidance,
            samples=args.samples, seed=seed, batch=args.batch, device=args.device, normalize=normalize,
        )  # fmt: skip
        return values, images

    def reference_velocity(self, x, t, rows):
        model, condition, _ = self.load(self.reference)
        return model.velocity(x, t, condition[rows])

    def measured(self, entry, seed):
        """-> {metric: number} of one model with one noise, from disk where it is there."""
        file = self.out / "scores" / f"{entry.title}.{entry.run}.seed{seed}.json"
        if file.is_file():
            values = files.read_json(file)
            if values.pop("model", None) != entry.what:
                raise InputError(f"{file}: holds another model's scores than {entry.what}; expected another --out, or name")
            if (reference := values.pop("reference", None)) != self.reference.what:
                raise InputError(
                    f"{file}: was measured from the reference {reference}, not {self.reference.what}; expected another --out"
                )
            return values
        with about(f"--models {entry.what}"):
            values, images = self.measure(entry, seed)
        if seed == entry.run == 0:
            folder = self.out / "images" / entry.title
            folder.mkdir(parents=True, exist_ok=True)
            for row in plots.shown(len(self.prompts)):
                for sample in range(self.args.samples):
                    write_png(folder / image_name(row, sample), images[row * self.args.samples + sample])
        files.write_json(file, {"model": entry.what, "reference": self.reference.what, **values})
        return values

    def rows(self):
        """Measures what has not been measured. -> a row (see tables.py) per name."""
        results = {}  # name -> step -> run -> [{metric: number} for each seed]
        for number, entry in enumerate(self.entries, 1):
            for seed in range(entry.seeds(self.args.seeds)):
                values = self.measured(entry, seed)
                steps = results.setdefault(entry.name, {})
                steps.setdefault(entry.step or 0, {}).setdefault(entry.run, []).append(values)
                print(f"{number}/{len(self.entries)}  {entry.title} run {entry.run} seed {seed}", flush=True)
        return [
            tables.row(name, None, [list(runs.values()) for _, runs in sorted(steps.items())])
            for name, steps in results.items()
        ]


def read_images(paths):
    """-> [N, C, H, W]; InputError names the first image of another size."""
    images = [read_png(path) for path in paths]
    for path, image in zip(paths, images):
        if image.shape != images[0].shape:
            raise InputError(f"{path}: is {list(image.shape)}; expected {list(images[0].shape)}, as the first of the folder")
    return torch.stack(images)


def side_by_side(evaluation, file):
    """As the paper's Figure 2: a row per prompt, a panel per model, with up to four images of each prompt."""
    panels, rows = {}, plots.shown(len(evaluation.prompts))
    last = {}
    for entry in sorted(evaluation.entries, key=lambda entry: entry.step or 0):
        last[entry.name] = entry.title  # of the last step
    for name in dict.fromkeys(entry.name for entry in evaluation.entries):
        names = [image_name(row, sample) for row in rows for sample in range(min(evaluation.args.samples, 4))]
        panels[name] = torch.stack([read_png(evaluation.out / "images" / last[name] / image) for image in names])
    plots.grids(file, panels, [evaluation.prompts[row] for row in rows])


def main(argv=None):
    args = parse(argv)
    evaluation = Evaluation(args)
    rows, out = evaluation.rows(), evaluation.out
    count = len(evaluation.prompts)
    files.write_json(out / "results.json", {"prompts": count, "seeds": args.seeds, "rows": tables.as_json(rows)})
    text = f"{count} prompts × {args.samples} images, {args.seeds} seeds, mean ± standard error.\n\n{tables.table(rows)}"
    files.write_bytes(out / "table.md", text.encode())
    for x in ("clip_diversity", "pixel_diversity", "w2"):
        if all(x in row["final"] for row in rows):
            plots.pictures(rows, x, ("reward",), out / f"reward_{x}.png")
    side_by_side(evaluation, out / "side_by_side.png")
    print(text)
    return {row["setting"]: row["final"] for row in rows}


if __name__ == "__main__":
    run_command(main)
