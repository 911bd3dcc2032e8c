"""Speed and memory beside the public libraries, counts, and growth: all of it, in under ten minutes on two cores.

    python -m bench                      # CPU, one thread; and CUDA where there is one
    python -m bench --quick              # small sizes: whether everything runs
    python -m bench --only generate      # cases whose name has this

Both sides of a case take turns in one process. There is no ratio where their outputs differ by more than a stated tolerance.
Written: bench/results/HARDWARE-DATE.json, and HARDWARE-DATE.md with the tables. Needs the extra `parity`.
"""

import argparse
import datetime
import gc
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch

from bench import counts, growth, images, language
from bench.measure import peak, ratio, turns

RESULTS = Path(__file__).parent / "results"


def compare(case, device):
    """Runs one Case on a device. -> what the table and the file have of it"""
    found = {"case": case.name, "peer": case.peer, "device": device, "differ": case.differ(), "of": case.of_what}
    found["agree"] = found["differ"] <= case.tolerance
    if found["agree"]:
        ours, theirs = turns(case, device)
        found |= {"seconds": ours, "seconds_peer": theirs, "ratio": ratio(ours, theirs)}
    found |= {"bytes": peak(case.ours, device), "bytes_peer": peak(case.theirs, device)}
    return found


def row(found):
    """A line of the table."""
    low, middle, high = found.get("ratio", [float("nan")] * 3)
    speed = f"**{middle:.2f}** ({low:.2f} … {high:.2f})" if found["agree"] else "outputs differ: none"
    memory = f"{found['bytes'] / 2**20:,.1f} | {found['bytes_peer'] / 2**20:,.1f}"
    return f"| {found['case']} | {found['peer']} | {speed} | {memory} | {found['differ']:.1e} | {found['device']} |"


def table(head, rows):
    """Markdown of rows of words and numbers."""
    words = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in each] for each in rows]
    return "\n".join(f"| {' | '.join(each)} |" for each in [head, ["---"] * len(head), *words])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--only", default="", help="cases whose name has this; nothing is written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    devices, start, found = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])], time.monotonic(), []
    head = ["what", "peer", "peer's time / ours, median (quartiles)", "MiB", "peer's MiB", "difference", "device"]
    print(table(head, []), flush=True)
    for device in devices:
        for room in (language, images):
            for case in room.cases(device, args.quick):
                if args.only in case.name:
                    found.append(compare(case, device))
                    print(row(found[-1]), flush=True)
                del case  # and with it the models that it holds
                gc.collect()
    if args.only:
        return
    counted, grown = list(counts.rows()), [[*each, device] for device in devices for each in growth.rows(device)]
    hardware = torch.cuda.get_device_name() if "cuda" in devices else f"{platform.machine()}-cpu"
    packages = {name: version(name) for name in ("torch", "transformers", "diffusers", "peft", "trl")}
    day = datetime.date.today().isoformat()
    about = {"date": day, "hardware": hardware, "threads": args.threads, "quick": args.quick, "packages": packages}
    about["seconds"] = round(time.monotonic() - start)
    text = "\n\n".join([
        f"{hardware}, {day}, {args.threads} thread, float32, {', '.join(map(' '.join, packages.items()))}: `python -m bench`",
        "\n".join([table(head, []), *map(row, found)]),
        table(["count", "ours", "peer"], counted),
        table(["growth of", "with", "sizes", "time ~ size^", "expected", "memory ~ size^", "expected", "device"], grown),
    ])  # fmt: skip
    name = f"{hardware.replace(' ', '-')}-{day}" + "-quick" * args.quick
    number = next(n for n in range(1, 1000) if not (RESULTS / f"{name}-{n}.json").exists())  # no run writes over another
    (RESULTS / f"{name}-{number}.json").write_text(
        json.dumps({**about, "cases": found, "counts": counted, "growth": grown}, indent=1) + "\n"
    )
    (RESULTS / f"{name}-{number}.md").write_text(text + "\n")
    print(f"\n{text}\n\n{RESULTS / name}-{number}.json")


if __name__ == "__main__":
    main()
