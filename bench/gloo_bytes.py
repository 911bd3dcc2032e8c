"""Bytes that ranks send in a gradient step, counted on the wire, beside what many_gpus.sent says. Linux, as root:

    unshare -n python -m bench.gloo_bytes

In a network of its own (unshare -n) the loopback device carries nothing but the ranks' traffic. The demos run with two and with
four gradient steps a round; the difference is what a step sends, with TCP's headers.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from bench.many_gpus import counted, sent
from nano_adrpo import demo
from nano_adrpo.models.mmdit import MMDiT

ROOT = Path(__file__).parents[1]
RUN = (
    "--rounds 2 --no-eval-first --eval-every 2 --eval-samples 2 --eval-prompts 2 --beta-unit reward --prompts-per-round 4 "
    "--group-size 2 --ode-steps 1"
).split()


def carried():
    """Bytes that the loopback device has sent so far."""
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split()[9])


def run(ranks, steps, options):
    with tempfile.TemporaryDirectory() as folder:
        before, torchrun = carried(), [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command = [*torchrun, ROOT / "train_flow.py", *RUN, "--inner-steps", str(steps), *options, "--out", f"{folder}/run"]
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
        return carried() - before


def main():
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    whole, adapters = counted(lambda: MMDiT.from_pretrained(Path(demo.FLOW["model"]) / "transformer", device="meta"), rank=8)
    print("| ranks | trained | mode | MB a step, counted | MB a step, computed |\n| --- | --- | --- | --- | --- |")
    for ranks in (2, 4):
        for what, mode, options, parameters in (
            ("all weights", "replicated", [], whole),
            ("adapters of rank 8", "replicated", ["--lora-rank", "8"], adapters),
            ("all weights", "fsdp", ["--fsdp"], whole),
        ):
            on_wire = (run(ranks, 4, options) - run(ranks, 2, options)) / 4
            computed = ranks * sent(ranks, parameters, 4, mode)
            print(f"| {ranks} | {what} | {mode} | {on_wire / 1e6:.2f} | {computed / 1e6:.2f} |", flush=True)


if __name__ == "__main__":
    main()
