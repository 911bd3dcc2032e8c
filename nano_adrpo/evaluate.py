"""The paper's Table 1 and Figure 3 for any set of models: rewards, diversities, divergence; a table, trade-offs, images.

    python -m nano_adrpo.evaluate --models base=nano_adrpo/demo/base tuned=runs/flow/model
    python -m nano_adrpo.evaluate --models base=SD3 adrpo@20=SD3+runs/sd3/round-20/adapter adrpo@40=SD3+runs/sd3/adapter \\
        flux=PNGS --prompts prompts.txt --rewards clip_score:CLIP pick_score:PICKSCORE aesthetic:CLIP --steps 28 \\
        --guidance 5 --device cuda --dtype bfloat16 --batch 8 --out runs/table1

A model is NAME=MODEL or NAME=MODEL+ADAPTER or, of any other system, NAME=FOLDER of images PROMPT_SAMPLE.png, both counted from
0 (0007_03.png), in seed0/, seed1/, … if there are several seeds. NAME@STEP is one checkpoint of a run: the table has the last,
the picture all. A name (or name and step) given again is another training run of the same method. The first model is the
base, from which W2 is measured. All models start from the same noises.

Written to --out: table.md and results.json (mean ± standard error, over training runs where a model has several, else over the
seeds of the noise), reward_….png, side_by_side.png, and images/. An evaluation that was interrupted goes on where it stopped:
what has been scored is not looked at again, so a model or reward that changed on disk needs another --out.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch

from nano_adrpo import compare, images, lora, metrics, plots, prompts, rewards, runtime, weights
from nano_adrpo.adrpo import interpolate
from nano_adrpo.demo import digits
from nano_adrpo.runtime import positive
from nano_adrpo.text_to_image import TextToImage

SHOWN = 10  # prompts, evenly spread, whose images are kept


class Entry(NamedTuple):
    name: str
    step: int | None
    what: str  # as on the command line
    model: str
    adapter: str | None
    run: int  # counts the entries of one name and step

    @property
    def title(self):
        return self.name if self.step is None else f"{self.name}@{self.step}"


def parse(argv=None):
    parser = runtime.Parser(__doc__.split("\n")[0])
    add = parser.add_argument_group("what").add_argument
    add(
        "--models",
        nargs="+",
        required=True,
        help="NAME[@STEP]=MODEL, MODEL+ADAPTER or a folder of images; the first is the base",
    )
    add("--base", help="folder for the parts that a MODEL lacks, as a single file its tokenizers")
    add("--prompts", help="one prompt a line, or JSON lines with \"prompt\"; default: the demo's 40, with the demo's judge")
    add("--rewards", nargs="+", default=[str(digits.HERE / "clip")], help="NAME:FOLDER[@WEIGHT] …, see nano_adrpo/rewards.py")
    add("--clip-diversity", choices=("normalized", "projected"), default="normalized", help="projected has the paper's scale")
    add = parser.add_argument_group("sampling").add_argument
    add("--seeds", type=positive(int), default=3, help="noises, from 0; 0 is the training script's evaluation")
    add("--samples", type=positive(int), default=8, help="images per prompt, at least 2")
    add("--steps", type=positive(int), default=10, help="Euler steps from noise to image; SD3's usual is 28")
    add("--shift", type=positive(float), help="time-grid shift; default the model's own")
    add("--guidance", type=positive(float), default=1.0, help="classifier-free guidance scale; 1 is none")
    add("--negative-prompt", default="", help="what guidance leads away from")
    add("--resolution", type=positive(int), help="side in pixels; default the model's own")
    add(
        "--t5",
        choices=("load", "stream", "zeros"),
        default="load",
        help="SD3's T5: at once, layer by layer from disk, without it",
    )
    add = parser.add_argument_group("run").add_argument
    add("--out", default="runs/evaluation", help="folder for the results, where an earlier evaluation goes on")
    add("--batch", type=positive(int), help="images at a time; default all")
    add("--device", type=runtime.device, default="cpu", help="torch device")
    add("--dtype", choices=tuple(runtime.DTYPES), default="float32", help="of weights and computation; rewards are float32")
    args = parser.parse_args(argv)
    if args.samples < 2:
        raise ValueError("--samples 1: expected at least 2, to compare images of one prompt")
    return args


def entries(specs):
    """--models -> [Entry]."""
    found = []
    for spec in specs:
        match = re.fullmatch(r"([^=@/]+)(?:@(\d+))?=(.+)", spec)
        if not match:
            raise ValueError(f"--models {spec!r}: expected NAME=MODEL, NAME=MODEL+ADAPTER or NAME@STEP=…")
        name, step, what = match[1], match[2] and int(match[2]), match[3]
        model, plus, adapter = (what, "", "") if Path(what).exists() else what.rpartition("+")
        for path in filter(None, (model or what, adapter)):
            if not Path(path).exists():
                raise FileNotFoundError(f"--models {spec!r}: {path}: no such file or folder")
        run = sum((entry.name, entry.step) == (name, step) for entry in found)
        found.append(Entry(name, step, what, model, adapter or None, run))
    return found


class Evaluation:
    def __init__(self, args):
        self.args, self.entries = args, entries(args.models)
        self.prompts = prompts.read_prompts(args.prompts) if args.prompts else digits.PROMPTS
        self.judge = None if args.prompts else digits.Judge.from_pretrained(digits.HERE / "judge")
        self.reward = rewards.parse(args.rewards)
        self.out, self.dtype = Path(args.out), runtime.DTYPES[args.dtype]
        self.rows = torch.arange(len(self.prompts)).repeat_interleave(args.samples)
        self.parts = torch.arange(len(self.rows)).split(args.batch or len(self.rows))
        self.loaded = {}  # the base's and the current entry's model and condition
        self.check()
        self.open()

    def check(self):
        """What would stop the evaluation later is refused now, from file names and headers."""
        args, base, images_only = self.args, None, {}
        for entry in self.entries:
            if images_only.setdefault(entry.name, is_images(entry.model)) != is_images(entry.model):
                raise ValueError(f"--models {entry.what}: {entry.name} is images and a model; expected one of them to a name")
            if is_images(entry.model):
                for seed in range(seeds_of(entry, args.seeds)):
                    files = image_files(Path(entry.model), seed, len(self.prompts), args.samples)
                    if missing := next((file for file in files if not file.is_file()), None):
                        raise FileNotFoundError(f"{missing}: no such file; expected {args.samples} images of every prompt")
                continue
            model = TextToImage.from_pretrained(entry.model, self.dtype, "meta", args.base, encoders=False)
            if entry.adapter:
                lora.load(model.transformer, entry.adapter)
            shape, base = self.shape(model), base or (entry.what, self.shape(model))
            if shape != base[1]:
                raise ValueError(f"--models {entry.what}: latents {list(shape)}; expected {list(base[1])}, those of {base[0]}")

    def open(self):
        """A folder of another evaluation is refused."""
        kept = ("models", "out", "device", "batch")  # may differ from call to call; models have results of their own
        options = {name: value for name, value in vars(self.args).items() if name not in kept} | {"texts": self.prompts}
        config = self.out / "config.json"
        if config.is_file():
            for name, value in weights.read_json(config).items():
                if value != options.get(name):
                    raise ValueError(
                        f"--out {self.out}: holds an evaluation with another --{name.replace('_', '-')} ({value!r})"
                    )
        else:
            runtime.open_run_folder(self.out)
            weights.write_json(config, options)
        (self.out / "scores").mkdir(exist_ok=True)

    def shape(self, model):
        """[C, H, W] of its latents."""
        with runtime.about("--resolution"):
            return model.latent_shape_at(self.args.resolution) if self.args.resolution else model.latent_shape

    def load(self, entry):
        """-> TextToImage and the Condition of all prompts and, last, the negative one."""
        if entry not in self.loaded:
            args, base = self.args, self.entries[0]
            self.loaded = {base: self.loaded[base]} if base in self.loaded else {}
            file = self.out / "embeddings" / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', entry.model)}.safetensors"
            texts = [*self.prompts, args.negative_prompt]
            condition = prompts.cached(file, texts, entry.model, self.dtype, args.device, args.base, args.t5)
            model = TextToImage.from_pretrained(entry.model, self.dtype, args.device, args.base, encoders=False)
            if entry.adapter:
                lora.load(model.transformer, entry.adapter)
            self.loaded[entry] = model, condition
        return self.loaded[entry]

    @torch.no_grad()
    def draw(self, entry, seed):
        """-> images [P · samples, C, H, W], on the CPU, and {"w2": divergence from the base}, {} where either is images."""
        if is_images(entry.model):
            return read_images(Path(entry.model), seed, len(self.prompts), self.args.samples), {}
        (model, condition), args = self.load(entry), self.args
        x0, t, noise = (x.to(args.device) for x in draws(len(self.rows), self.shape(model), seed))
        times, negative = model.times(args.steps, args.shift), torch.full_like(self.rows, -1)
        x1 = [
            model.sample(x0[part], condition[self.rows[part]], times, condition[negative[part]], args.guidance)
            for part in self.parts
        ]
        drawn = torch.cat([model.decode(latents).float().cpu() for latents in x1])
        if is_images(self.entries[0].model):
            return drawn, {}
        x_t, _ = interpolate(noise, torch.cat(x1), t)
        v, v_ref = (
            torch.cat([model.velocity(x_t[part], t[part], condition[self.rows[part]]) for part in self.parts])
            for model, condition in (self.load(entry), self.load(self.entries[0]))
        )
        return drawn, {"w2": metrics.w2_divergence(v, v_ref)}

    def score(self, entry, seed):
        """-> {metric: number} of one model with one noise, from disk where it is there."""
        file = self.out / "scores" / f"{entry.title}.{entry.run}.seed{seed}.json"
        if file.is_file():
            stored = weights.read_json(file)
            if stored.pop("model", None) != entry.what:
                raise ValueError(f"{file}: holds another model's scores than {entry.what}; expected another --out, or name")
            if (base := stored.pop("base", None)) != self.entries[0].what:
                raise ValueError(
                    f"{file}: was measured from the base {base}, not {self.entries[0].what}; expected another --out"
                )
            return stored
        drawn, w2 = self.draw(entry, seed)
        if self.judge and drawn.shape[1:] != (1, 8, 8):
            raise ValueError(
                f"--models {entry.what}: images {list(drawn.shape[1:])}; expected the demo's, [1, 8, 8], or --prompts"
            )
        texts = [self.prompts[row] for row in self.rows]
        with self.reward.on(self.args.device):
            scores = [self.reward(drawn[part], [texts[i] for i in part]) for part in self.parts]
            embeddings = [self.reward.embed_images(drawn[part]) for part in self.parts]
        scores = {name: torch.cat([score[name] for score in scores]) for name in scores[0]}
        embeddings = None if embeddings[0] is None else torch.cat(embeddings)
        normalize = self.args.clip_diversity == "normalized"
        values = metrics.of_images(drawn, scores, embeddings, self.args.samples, normalize) | w2
        if self.judge:
            values |= self.judge.evaluate(drawn, texts)
        if seed == entry.run == 0:
            folder = self.out / "images" / entry.title
            folder.mkdir(parents=True, exist_ok=True)
            for row in shown(len(self.prompts)):
                for sample in range(self.args.samples):
                    images.write_png(folder / image_name(row, sample), drawn[row * self.args.samples + sample])
        weights.write_json(file, {"model": entry.what, "base": self.entries[0].what, **values})
        return values

    def run(self):
        """-> a row per name: {"setting", "final": {metric: (mean, error)}, "path": [means, a checkpoint each]}."""
        results = {}
        for number, entry in enumerate(self.entries, 1):
            for seed in range(seeds_of(entry, self.args.seeds)):
                results.setdefault((entry.name, entry.step), {}).setdefault(entry.run, []).append(self.score(entry, seed))
                print(f"{number}/{len(self.entries)}  {entry.title} run {entry.run} seed {seed}", flush=True)
        rows = {}
        for (name, _), runs in sorted(results.items(), key=lambda item: item[0][1] or 0):
            final = summary(list(runs.values()))
            row = rows.setdefault(name, {"setting": name, "lr": None, "path": []})
            row["path"].append({metric: mean for metric, (mean, _) in final.items()})
            row["final"] = final  # of the last step
        return [rows[name] for name in dict.fromkeys(entry.name for entry in self.entries)]


def draws(count, shape, seed=0):
    """The random numbers of an evaluation, on the CPU, equal on every machine: noise to start from; times and noises for W2."""
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    return (
        torch.randn(count, *shape, generator=generator),
        torch.rand(count, generator=generator),
        torch.randn(count, *shape, generator=generator),
    )


def summary(runs):
    """[[metrics of a seed] of a training run] -> {metric: (mean, standard error)}: over runs where several, else seeds."""
    values = {}
    for metric in runs[0][0]:
        means = [metrics.mean_and_standard_error([seed[metric] for seed in run])[0] for run in runs]
        values[metric] = metrics.mean_and_standard_error(means if len(runs) > 1 else [seed[metric] for seed in runs[0]])
    return values


def image_name(prompt, sample):
    return f"{prompt:04d}_{sample:02d}.png"


def is_images(path):
    """Whether a folder has images of another system, not a model (whose folder may show some, as SD3's does)."""
    path = Path(path)
    return (
        path.is_dir()
        and not (path / "transformer").is_dir()
        and any(next(folder.glob("*.png"), None) for folder in (path, path / "seed0"))
    )


def seeds_of(entry, wanted):
    """How many seeds an entry has: of images in one folder, one."""
    return 1 if is_images(entry.model) and not (Path(entry.model) / "seed0").is_dir() else wanted


def image_files(folder, seed, count, samples):
    """The files of one seed's images, those of one prompt contiguous."""
    folder = folder / f"seed{seed}" if (folder / "seed0").is_dir() else folder
    return [folder / image_name(row, sample) for row in range(count) for sample in range(samples)]


def read_images(folder, seed, count, samples):
    """-> [count · samples, C, H, W]; FileNotFoundError names the first image that is missing."""
    files = image_files(folder, seed, count, samples)
    read = [images.read_png(file) for file in files]
    for file, image in zip(files, read):
        if image.shape != read[0].shape:
            raise ValueError(f"{file}: is {list(image.shape)}; expected {list(read[0].shape)}, as the first of the folder")
    return torch.stack(read)


def shown(count):
    """Rows of at most SHOWN prompts, evenly spread."""
    return torch.linspace(0, count - 1, min(SHOWN, count)).long().tolist()


def side_by_side(evaluation, file):
    """As the paper's Figure 2: a row per prompt, a panel per model."""
    panels, rows, samples = {}, shown(len(evaluation.prompts)), evaluation.args.samples
    for name in dict.fromkeys(entry.name for entry in evaluation.entries):
        named = [entry for entry in evaluation.entries if entry.name == name]
        entry = max(named, key=lambda entry: entry.step or 0)  # the last step
        folder = evaluation.out / "images" / entry.title
        panels[entry.name] = torch.stack(
            [images.read_png(folder / image_name(row, sample)) for row in rows for sample in range(min(samples, 4))]
        )
    plots.grids(file, panels, [evaluation.prompts[row] for row in rows])


def main(argv=None):
    args = parse(argv)
    evaluation = Evaluation(args)
    rows, out = evaluation.run(), evaluation.out
    weights.write_json(
        out / "results.json", {"prompts": len(evaluation.prompts), "seeds": args.seeds, "rows": compare.as_json(rows)}
    )
    text = f"{len(evaluation.prompts)} prompts × {args.samples} images, {args.seeds} seeds, mean ± standard error.\n\n"
    weights.write_bytes(out / "table.md", (text + compare.table(rows, start=None)).encode())
    for x in ("clip_diversity", "pixel_diversity", "w2"):
        if all(x in row["final"] for row in rows):
            compare.pictures(rows, x, ("reward",), out / f"reward_{x}.png")
    side_by_side(evaluation, out / "side_by_side.png")
    print((out / "table.md").read_text(encoding="utf-8"))
    return {row["setting"]: row["final"] for row in rows}


if __name__ == "__main__":
    runtime.run(main)
