"""Checkpoints: what a run needs to go on as if it had never stopped.

    OUT/checkpoints/step-N/    the state after round N
      state.safetensors        what is trained, its moving average, AdamW's moments, the generators, the pictures' images
      state.json               the run's memory: round, evaluations, options, lengths of the logs, …
      manifest.json            size and SHA-256 of each other file: they make a checkpoint whole

A checkpoint is for this run alone, to go on; model/, adapter/ and round-N/ (--keep-checkpoints) are results, for whoever opens
them, and hold the moving average. A script calls `begin` (--resume: finds the newest whole checkpoint), `restore` once its
model is there, and `save_if_due` after each round.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import torch

from nano_adrpo import files
from nano_adrpo.errors import InputError, NotWritten, about, writing
from nano_adrpo.files import safetensors, values
from nano_adrpo.training import distributed, options, sharding
from nano_adrpo.training.life import refuse_used
from nano_adrpo.training.step import trained

STATE, MEMORY, MANIFEST = "state.safetensors", "state.json", "manifest.json"
LOGS = ("metrics.jsonl", "samples.txt")  # they grow with the rounds; --resume cuts what was written after the checkpoint
INPUTS = ("model", "base", "adapter", "prompts", "held_out", "problems", "few_shot", "chat_template")  # may move, not change
# Options that --resume may change: they say where and how something is computed or kept, not what.
FREE = {
    *INPUTS, "embeddings", "device", "micro_batch", "rollout_batch", "gradient_checkpointing", "compile", "fsdp",
    "checkpoint_every", "keep_every", "keep_checkpoints", "patience_nonfinite",
}  # fmt: skip


def begin(args, life, **start):
    """-> the run's memory, a dict of JSON values and tensors that every checkpoint holds: `start`, or with --resume what the
    newest whole checkpoint in --out has of it. memory["round"] is the last round that is done, −1 for none.

    life   life.Life, which holds the folder of a run that goes on

    Raises InputError for a used folder without --resume, for one that another process works in, for options and inputs that
    are not the run's, and where no checkpoint is whole. Of several ranks the first does all this.
    """
    return distributed.first(lambda: find(args, life, start))


def find(args, life, start):
    refuse_used(args.out, args.resume)
    with about("--out"):
        files.check_writable(args.out or "runs")
    config = json.loads(json.dumps(options.saved(args)))
    memory = {"round": -1, "skipped": 0, "logs": {}, "config": config, "inputs": fingerprints(args)}
    memory |= {"torch": torch.__version__, **start}
    if not (args.resume and (Path(args.out) / "config.json").is_file()):
        return memory
    out = life.folder = Path(args.out)
    life.lock(out)
    refuse_changes(out, files.read_json(out / "config.json"), args)
    sweep(out)
    newest = newest_whole(out)
    if newest is None:
        if finished(out / LOGS[0], args.rounds):
            raise InputError(f"--out {out}: the run is finished and has no checkpoint; expected one, or a new folder")
        print(f"{out}: has no checkpoint yet; the run starts anew", flush=True)
        return memory
    stored = safetensors.Checkpoint(newest / STATE)
    found = values.join(files.read_json(newest / MEMORY), stored.read)
    refuse_changes(out, found["config"], args)
    for name in {**found["inputs"], **memory["inputs"]}:
        if found["inputs"].get(name) != memory["inputs"].get(name):
            given = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise InputError(f"{given}: not what the run in {out} began with; expected the same content")
    if found["torch"] != memory["torch"]:
        print(f"warning: torch {found['torch']} wrote {newest}, this is {memory['torch']}: digits may differ", flush=True)
    done = "is finished" if found["round"] >= args.rounds else "goes on"
    print(f"{out}: the run {done} after round {found['round']}, from {newest}", flush=True)
    return memory | found | {"config": config, "torch": memory["torch"]}


def finished(log, rounds):
    """Whether a run's log has its last round. A killed run's last line may be half a line."""
    return log.is_file() and any(line.startswith(f'{{"round": {rounds},') for line in files.read_text(log).split("\n"))


def restore(out, memory, network, optimizer, ema, generators):
    """Gives network, optimizer, moving average and generators the values of the checkpoint that `begin` found, and cuts the
    logs to its round. Without one it does nothing to a new run.

    generators   {name: torch.Generator}
    """
    for name in LOGS if distributed.rank() == 0 else ():
        cut(out / name, memory["logs"].get(name, 0))
    if memory["round"] < 0:
        return
    stored = safetensors.Checkpoint(out / "checkpoints" / f"step-{memory['round']}" / STATE)
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    expected = {f"parameter.{name}": parameter for name, parameter in zip(names, trained(network))}
    safetensors.check(stored, [key for key in stored.shapes if key in expected], expected, type(network).__name__)
    with torch.no_grad():
        for key, parameter in expected.items():
            parameter.copy_(sharding.part(parameter, stored.read(key)))
        for name, average in zip(names, ema.average):
            average.copy_(sharding.part(average, stored.read(f"average.{name}")))
    moments = {}
    for index, (name, parameter) in enumerate(zip(names, trained(network))):  # one that never had a gradient has none
        keys = [key for key in stored.shapes if key.startswith(f"optimizer.{name}.")]
        read = {key.rpartition(".")[2]: sharding.part(parameter, stored.read(key).clone()) for key in keys}
        moments |= {index: read} if keys else {}
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, generator in generators.items():
        try:
            generator.set_state(stored.read(f"generator.{name}"))
        except (RuntimeError, TypeError):  # a GPU's has other numbers than the CPU's
            kind = generator.device.type
            raise InputError(f"--device {kind}: the run in {out} draws on another kind of device; expected that one") from None


def tensors_of(network, optimizer, ema, generators):
    """-> {name: tensor}, what `restore` reads, on every rank."""
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    tensors = {f"parameter.{name}": parameter for name, parameter in zip(names, trained(network))}
    tensors |= {f"average.{name}": average for name, average in zip(names, ema.average)}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{names[index]}.{key}": value for key, value in moments.items()}
    tensors = {name: sharding.full(tensor) for name, tensor in tensors.items()}
    return tensors | {f"generator.{name}": generator.get_state() for name, generator in generators.items()}


def save_if_due(args, life, out, round, memory, *parts):
    """Writes a checkpoint every --checkpoint-every rounds, or else after each evaluation, and after the last round. After
    SIGINT or SIGTERM it writes one, says how to go on and ends the process.

    parts   network, optimizer, moving average and generators, see `restore`
    """
    memory["round"] = round
    life.signal = max(distributed.gather([life.signal or 0])) or None  # it may have come to some ranks alone
    if life.signal or round % (args.checkpoint_every or args.eval_every) == 0 or round == args.rounds:
        try:
            save(out, memory, tensors_of(*parts), args.keep_every)
        except NotWritten as error:
            raise NotWritten(f"round {round}: {error}; last checkpoint: {last(out)}") from None
    if life.signal:
        start = [sys.executable] if distributed.size() == 1 else ["torchrun", "--nproc-per-node", str(distributed.size())]
        command = shlex.join([*start, sys.argv[0], "--resume", "--out", str(out)])
        print(f"{signal.Signals(life.signal).name} after round {round}; to go on: {command}", flush=True)
        sys.exit(128 + life.signal)


@distributed.once
def save(out, memory, tensors, keep_every=None):
    """Writes step-N, whole or not at all: a temporary folder is flushed to the disk and renamed. Then older checkpoints go, but
    for the one before and those of every `keep_every`-th round. Raises NotWritten naming the file that cannot be written."""
    folder = out / "checkpoints" / f"step-{memory['round']}"
    temporary, replaced = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old.tmp")
    memory["logs"] = {name: flush(out / name) for name in LOGS if (out / name).exists()}
    tensors = dict(tensors)
    text = values.split(memory, "memory", tensors)
    with writing(folder):
        folder.parent.mkdir(exist_ok=True)
        temporary.mkdir()
        safetensors.save(temporary / STATE, tensors)
        files.write_json(temporary / MEMORY, text)
        files.write_json(temporary / MANIFEST, {name: measure(temporary / name) for name in (STATE, MEMORY)})
        flush(temporary)
        if folder.exists():  # a damaged one, or this round was done before
            os.rename(folder, replaced)
        os.rename(temporary, folder)
        flush(folder.parent)
        found = steps(out)
        last_two = [number for number in sorted(found) if number <= memory["round"]][-2:]
        for number in found:
            if number not in last_two and (number > memory["round"] or not keep_every or number % keep_every):
                os.rename(found[number], found[number].with_name(f".step-{number}.old.tmp"))
        sweep(out)


# ------------------------------------------------------------------------------------------------------ whole or damaged


def steps(out):
    """{round: folder} of the checkpoints in a run's folder, whole or not."""
    named = {folder: re.fullmatch(r"step-(\d+)", folder.name) for folder in (out / "checkpoints").glob("step-*")}
    return {int(name[1]): folder for folder, name in named.items() if name}


def last(out):
    """The newest checkpoint's name, for messages."""
    found = steps(out)
    return found[max(found)] if found else "none yet"


def newest_whole(out):
    """The newest whole checkpoint's folder, with a warning about each damaged one; None where there is none at all. Raises
    InputError where none is whole."""
    found = steps(out)
    for number in sorted(found, reverse=True):
        if (why := damage(found[number])) is None:
            return found[number]
        print(f"warning: {found[number]} is damaged ({why}) and is not used", flush=True)
    if found:
        raise InputError(f"{out / 'checkpoints'}: no checkpoint in it is whole; expected one")
    return None


def damage(folder):
    """What is wrong with a checkpoint, or None."""
    try:
        listed = files.read_json(folder / MANIFEST)
        for name in {STATE: 0, MEMORY: 0, **listed}:
            if Path(name).name != name or not (folder / name).is_file():
                return f"{name!r} is missing"
            if measure(folder / name) != listed.get(name):
                return f"{name} is not what {MANIFEST} says"
    except (InputError, OSError) as error:
        return str(error)
    return None


def measure(file):
    """Its size and SHA-256."""
    with open(file, "rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def sweep(out):
    """Removes what a run that was killed, or a checkpoint that was replaced, left behind."""
    for path in list(out.rglob(".*.tmp")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------- logs, options, inputs


def flush(path):
    """Flushes a file, or the names in a folder, to the disk; -> its length in bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def cut(file, length):
    """Cuts a log to the length that a checkpoint knows."""
    size = file.stat().st_size if file.exists() else 0
    if size < length:
        raise InputError(f"{file}: has {size} bytes; expected the {length} that the run wrote before its checkpoint")
    if length:
        os.truncate(file, length)
    elif size:
        file.write_bytes(b"") if file.name == LOGS[0] else file.unlink()  # the first one is locked, see life.Life.lock


def refuse_changes(out, before, args):
    """Refuses options that would make another run of the one that goes on. before: its options, as config.json has them."""
    for name, value in json.loads(json.dumps(options.saved(args))).items():
        if name in FREE or value == before.get(name, value):
            continue
        option = f"--{name.replace('_', '-')} {value}"
        if name != "rounds":
            raise InputError(f"{option}: the run in {out} has {before[name]}; expected no option that changes the run")
        if value < before[name]:
            raise InputError(f"{option}: the run in {out} has {before[name]}; expected as many or more")
        if args.lr_schedule != "constant":
            raise InputError(f"{option}: the run in {out} has {before[name]}, and --lr-schedule {args.lr_schedule} needs it")


def fingerprints(args):
    """{option: SHA-256 of the files it names, or None}, for each option that names inputs."""
    return {name: fingerprint(Path(path)) for name in INPUTS if (path := getattr(args, name, None))}


def fingerprint(path):
    """SHA-256 of the content of a file, or of a folder's weights, configs and vocabularies; None where there is nothing. Of
    files above 16 MiB it reads sixteen blocks of 1 MiB: other weights differ everywhere."""
    kinds = (".safetensors", ".json", ".txt", ".model", ".jinja")
    inside = sorted(file for file in path.rglob("*") if file.suffix in kinds and file.is_file())
    digest, mib = hashlib.sha256(), 2**20
    for file in [path] if path.is_file() else inside:
        size = file.stat().st_size
        digest.update(repr([file.relative_to(path).as_posix(), size]).encode())
        with open(file, "rb") as opened:
            for block in range(16):
                opened.seek(block * (size - mib) // 15 if size > 16 * mib else block * mib)
                digest.update(opened.read(mib))
    return digest.hexdigest() if path.exists() else None
