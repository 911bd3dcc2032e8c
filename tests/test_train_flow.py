"""train_flow.py end to end on the demo's model: the gradient of Eq. 6, learning, determinism, every option, bad input."""

import importlib.util
import json
import re
import shutil

import flow_runs
import pytest
import torch
from flow_runs import NEEDS, SMALL, TINY, train
from scripts import lines, refused, written

import train_flow
from nano_adrpo import demo
from nano_adrpo.evaluation.images import Evaluation
from nano_adrpo.rewards.images import ClipScore
from nano_adrpo.text_to_image import TextToImage
from nano_adrpo.text_to_image.prompts import read_prompts

few = flow_runs.few

# -------------------------------------------------------------------------------------------------------------------- runs


def test_three_rounds_write_everything(tmp_path):
    values = train(tmp_path / "run")
    names = {"config.json", "metrics.jsonl", "checkpoints", "model", "before_after.png", "evolution.png", "curves.png"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == names
    rows = lines(tmp_path / "run")
    assert [row["round"] for row in rows] == [0, 1, 2, 3] and [("eval" in row) for row in rows] == [True, False, True, True]
    assert rows[0]["eval"]["w2"] == 0 < rows[3]["eval"]["w2"] and rows[3]["eval"] == values
    tuned, base = (
        TextToImage.from_pretrained(path).transformer.state_dict() for path in (tmp_path / "run" / "model", demo.FLOW["model"])
    )
    assert tuned.keys() == base.keys() and not all(torch.equal(tuned[name], base[name]) for name in base)


def test_the_same_seed_writes_the_same_bytes_and_a_config_repeats_a_run(tmp_path, few):
    few("a", "--seed", 5, "--ema", 0.5)
    train_flow.main(["--config", str(tmp_path / "a" / "config.json"), "--out", str(tmp_path / "b")])
    assert written(tmp_path / "a") == written(tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()


def test_the_first_gradient_is_that_of_the_paper(tmp_path, monkeypatch):
    # Draws the first step of the first round again outside the script and differentiates Eq. 6, written out here.
    gradient, step = {}, train_flow.optimizer_step

    def watched(optimizer, loss, args, ema):
        gradient["all"] = torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]])
        gradient["loss"] = loss
        return step(optimizer, loss, args, ema)

    monkeypatch.setattr(train_flow, "optimizer_step", watched)
    options = "--rounds 1 --inner-steps 1 --beta0 2 --a-min -5 --a-max 3 --no-eval-first --micro-batch 4".split()
    train(tmp_path / "run", *options)

    model, g = TextToImage.from_pretrained(demo.FLOW["model"], torch.float32), torch.Generator().manual_seed(0)
    texts = [prompt.text for prompt in read_prompts(demo.FLOW["prompts"])]
    drawn = torch.randint(len(texts), (4,), generator=g).tolist()
    prompts = [texts[row] for row in drawn for _ in range(4)]
    condition = model.encode(prompts)
    x1 = torch.randn(16, 3, 16, 16, generator=g)
    for k in range(4):  # Euler's method, as the script's four steps
        x1 = x1 + 0.25 * model.velocity(x1, k / 4, condition).detach()
    rewards = ClipScore(demo.FLOW["reward"][0])(x1, prompts)
    A = (rewards.reshape(4, 4) - rewards.reshape(4, 4).mean(dim=1, keepdim=True)).flatten().clamp(-5, 3)
    t, x0 = torch.rand(16, generator=g), torch.randn(16, 3, 16, 16, generator=g)
    x_t = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * x1
    v = model.velocity(x_t, t, condition)
    to_sample, to_reference = (((v - target) ** 2).mean(dim=(1, 2, 3)) for target in (x1 - x0, v.detach()))
    loss = (A * to_sample + (2 - A) * to_reference).mean()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.transformer.parameters()])
    assert gradient["loss"] == pytest.approx(loss.item(), rel=1e-3)
    torch.testing.assert_close(gradient["all"], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("method", train_flow.METHODS)
def test_the_split_into_micro_batches_changes_no_gradient(few, monkeypatch, method):
    gradients, step = {}, train_flow.optimizer_step

    def watched(optimizer, loss, args, ema):
        grads = torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]])
        gradients.setdefault(args.micro_batch, grads.clone())
        return step(optimizer, loss, args, ema)

    monkeypatch.setattr(train_flow, "optimizer_step", watched)
    for size in (None, 1):
        options = [*(["--micro-batch", size] if size else []), *NEEDS.get(method, [])]
        few(str(size), "--group-size", 4, "--inner-steps", 1, "--no-eval-first", "--method", method, *options)
    whole, split = gradients[None], gradients[1]
    assert whole.abs().max() > 0 and (whole - split).norm() < 1e-4 * whole.norm()


def test_coefficients_are_the_table():
    rewards = torch.tensor([0.0, 2.0, 10.0, 4.0])
    A = torch.tensor([-4.0, -2.0, 6.0, 0.0])
    args = train_flow.parse([*SMALL, "--beta0", "3", "--a-min", "-2", "--a-max", "2"])
    args.tau = 0.5
    numbers = {
        name: [torch.as_tensor(c).expand(4).tolist() for c in coefficients(rewards, A, [torch.arange(4.0)], args)]
        for name, coefficients in train_flow.METHODS.items()
    }
    assert numbers["adrpo"] == [[-2, -2, 2, 0], [5, 5, 1, 3]]
    assert numbers["fixed-beta"] == [[-2, -2, 2, 0], [3, 3, 3, 3]]
    assert numbers["gardo-gate"] == [[-2, -2, 2, 0], [0, 0, 3, 0]]  # the third alone is better by R than by the other reward
    assert numbers["anti"] == [[-2, -2, 2, 0], [1, 1, 5, 3]]
    args.group_size = 2
    assert [c.tolist() for c in train_flow.METHODS["shuffled"](rewards, A, [], args)] == [[-2, -2, 2, 0], [1, 3, 5, 5]]
    assert numbers["raft"] == [[0, 0, 1, 0], [0, 0, 0, 0]]
    e = [torch.tensor(x / 2).exp().item() for x in (0, 2, 10, 4)]
    assert numbers["orw-cfm-w2"] == [pytest.approx([4 * x / sum(e) for x in e]), [3, 3, 3, 3]]


def test_dpo_compares_the_best_with_the_worst_of_each_group(few, monkeypatch):
    seen, loss = [], train_flow.adrpo.flow_dpo_loss
    monkeypatch.setattr(train_flow.adrpo, "flow_dpo_loss", lambda *args: seen.append(args) or loss(*args))
    kept, best_and_worst = [], train_flow.best_and_worst
    monkeypatch.setattr(train_flow, "best_and_worst", lambda *args: kept.append((args, best_and_worst(*args))) or kept[-1][1])
    few("run", "--method", "dpo", "--prompts-per-round", 4, "--group-size", 4, "--inner-steps", 1, "--no-eval-first")
    ((_, R, x1, told), (pairs, kept_told)), ((v, u, _, winner, loser, beta, count),) = kept[0], seen
    for group in range(4):
        rewards = R[4 * group : 4 * group + 4].tolist()
        for place, chosen in ((0, max(rewards)), (1, min(rewards))):
            assert torch.equal(pairs[2 * group + place], x1[4 * group + rewards.index(chosen)])
            assert torch.equal(kept_told.context[2 * group + place], told.context[4 * group])
    assert (beta, count, len(v)) == (50, 4, 8)
    torch.testing.assert_close(pairs[winner] - u[winner], pairs[loser] - u[loser])  # x0 = x1 − u, shared by a pair


def rollouts(monkeypatch):
    """-> the rollouts of the runs that follow, each the arguments (x0, condition, times) and the samples x1."""
    found, draw = [], TextToImage.draw

    def watched(self, x0, condition, times, *args, **options):
        x1, images = draw(self, x0, condition, times, *args, **options)
        if "transformer" in options:  # an evaluation asks for none
            found.append(((x0, condition, times), x1))
        return x1, images

    monkeypatch.setattr(TextToImage, "draw", watched)
    return found


@pytest.mark.parametrize("adapters", [(), ("--lora-rank", 2)], ids=["weights", "adapters"])
def test_off_line_dpo_compares_samples_of_the_reference_and_is_the_on_line_one_in_the_first_round(few, monkeypatch, adapters):
    options, base = ["--rounds", 3, "--lr", 1e-2, *adapters], TextToImage.from_pretrained(demo.FLOW["model"], torch.float32)
    logs = {}
    for method, rounds in (("dpo", [True, False, False]), ("dpo-offline", [True] * 3)):
        with monkeypatch.context() as patch:
            found = rollouts(patch)
            logs[method] = lines(few(method, "--method", method, *options))
        assert [torch.allclose(base.sample(*asked), x1, atol=1e-5) for asked, x1 in found] == rounds
    assert logs["dpo"][:2] == logs["dpo-offline"][:2] and logs["dpo-offline"][3]["eval"]["w2"] > 0


def test_off_line_dpo_goes_on_with_the_reference_of_the_start(tmp_path, few):
    whole = few("whole", "--method", "dpo-offline", "--rounds", 3, "--lr", 1e-2, "--checkpoint-every", 1, "--keep-every", 1)
    shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-3")
    train_flow.main(["--resume", "--out", str(tmp_path / "cut")])
    assert written(tmp_path / "cut") == written(whole)


def test_rounds_zero_evaluates_only(few):
    out = few("run", "--rounds", 0)
    assert [row["round"] for row in lines(out)] == [0] and not (out / "model").exists()
    assert lines(out)[0]["eval"] == lines(few("trained"))[0]["eval"]


def test_a_default_folder_is_new_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_flow.plots, "pyplot", lambda file: None)
    (tmp_path / "two.txt").write_text("a green two\na blue nine\n")
    for _ in range(3):
        train_flow.main([*TINY, "--prompts", "two.txt"])
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["flow", "flow-2", "flow-3"]
    assert written(tmp_path / "runs" / "flow") == written(tmp_path / "runs" / "flow-3")


def test_what_is_evaluated_and_saved_is_the_moving_average(tmp_path, few):
    # Adapters of the average, opened in a new model, give the run's last evaluation again.
    out = few("run", "--lora-rank", 2, "--lr", 0.05, "--ema", 0.5, "--rounds", 2)
    again = few("again", "--rounds", 0, "--model", merged(out / "adapter", tmp_path / "merged"))
    assert lines(again)[0]["eval"]["reward"] == pytest.approx(lines(out)[2]["eval"]["reward"], abs=1e-3)
    assert lines(few("raw", "--lora-rank", 2, "--lr", 0.05, "--rounds", 2))[2]["eval"]["reward"] != pytest.approx(
        lines(out)[2]["eval"]["reward"], abs=1e-2
    )


def merged(adapter, folder):
    from nano_adrpo import lora

    model = TextToImage.from_pretrained(demo.FLOW["model"], torch.float32)
    lora.merge(lora.load(model.transformer, adapter))
    model.save_pretrained(folder)
    return folder


def test_the_means_of_the_coefficients_are_logged_and_add_up_to_beta0(few):
    # A clip of one side alone: the mean of A is not 0 then, and that of β not β0.
    row = lines(few("run", "--group-size", 8, "--a-min", -0.5, "--beta0", 2))[1]
    assert row["weight_mean"] > 0.1 and row["weight_mean"] + row["beta_mean"] == pytest.approx(2, abs=1e-5)


def test_equal_rewards_are_warned_of(tmp_path, few, capsys):
    (tmp_path / "flat.py").write_text("def flat(images, prompts):\n    return [1.0] * len(prompts)\n")
    out = few("run", "--reward", f"{tmp_path / 'flat.py'}:flat", "--rounds", 2)
    printed = capsys.readouterr().out
    assert printed.count("warning: in 2 rounds no group's rewards differed") == 1
    assert all(row["zero_spread"] == 1 and row["beta_min"] == row["beta_max"] == pytest.approx(0.03) for row in lines(out)[1:])


def test_the_phases_are_printed(few, capsys):
    few("run")
    printed = capsys.readouterr().out
    first, second = (next(line for line in printed.splitlines() if line.startswith(f"round {n}/1")) for n in (0, 1))
    assert "evaluation " in first and "rollout" not in first  # the first evaluation is booked to round 0
    assert all(f"{phase} " in second for phase in ("rollout", "reward", "update", "evaluation"))


def test_without_matplotlib_a_run_says_what_it_left_out(few, monkeypatch, capsys):
    monkeypatch.undo()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest))
    out = few("run")
    assert {p.name for p in out.iterdir()} == {"config.json", "metrics.jsonl", "checkpoints", "model"}
    printed = capsys.readouterr().out
    for name in ("before_after.png", "evolution.png", "curves.png"):
        assert f"{out / name}: left out, matplotlib is not installed" in printed


def test_beta0_is_in_deviations_of_the_reward_so_its_scale_changes_nothing(few, capsys):
    reward = demo.FLOW["reward"][0]
    runs = [few(str(k), "--beta-unit", "deviation", "--reward", f"{reward}@{k}") for k in (1, 4)]
    printed = capsys.readouterr().out
    assert (
        written(runs[0])["model/transformer/diffusion_pytorch_model.safetensors"]
        == (written(runs[1])["model/transformer/diffusion_pytorch_model.safetensors"])
    )
    for out in runs:
        first, second = lines(out)
        deviation = first["eval"]["reward_std"]  # times 0.03, the default β0
        assert first["beta0"] == pytest.approx(0.03 * deviation) and second["beta_mean"] == pytest.approx(0.03, abs=1e-6)
        line = f"β0 = 0.03 deviations of the reward within a group = {0.03 * deviation:.3g} in units of the reward\n"
        assert line in printed
    assert lines(runs[1])[0]["beta0"] == 4 * lines(runs[0])[0]["beta0"]


def test_both_units_give_the_same_gradient_up_to_the_unit(few, monkeypatch):
    gradients, step = [], train_flow.optimizer_step

    def watched(optimizer, loss, args, ema):
        gradients.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]))
        return step(optimizer, loss, args, ema)

    monkeypatch.setattr(train_flow, "optimizer_step", watched)
    bounds = ("--beta0", 0.75, "--a-min", -1.5, "--a-max", 0.5)
    unit = lines(few("deviation", "--inner-steps", 1, "--beta-unit", "deviation", *bounds))[0]["beta0"] / 0.75
    few("reward", "--inner-steps", 1, *(x if isinstance(x, str) else x * unit for x in bounds))
    torch.testing.assert_close(gradients[0] * unit, gradients[1], rtol=1e-3, atol=1e-4 * gradients[1].abs().max().item())


def test_the_deviation_must_be_there_and_measured(tmp_path, few, capsys):
    (tmp_path / "flat.py").write_text("def flat(images, prompts):\n    return [1.0] * len(prompts)\n")
    options = ["--beta-unit", "deviation", "--reward", f"{tmp_path / 'flat.py'}:flat"]
    line = refused(capsys, lambda: few("flat", *options))
    assert "--beta-unit deviation: no two rewards of a group differ in the first evaluation" in line
    few("zero", "--rounds", 0, *options)  # nothing is trained
    line = refused(capsys, lambda: few("first", "--beta-unit", "deviation", "--no-eval-first"))
    assert "--no-eval-first: expected with --beta-unit reward" in line


SEEN = """import json

def seen(images, prompts):
    with open({file!r}, "a") as file:
        file.write(json.dumps(prompts) + "\\n")
    return images.mean(dim=(1, 2, 3))
"""


def test_held_out_prompts_are_evaluated_beside_the_others_and_never_drawn(tmp_path, few, capsys):
    (tmp_path / "mine.py").write_text(SEEN.format(file=str(tmp_path / "seen")))
    held_out = [{"prompt": "a red one", "category": "colouring"}, {"prompt": "a red two and a blue one", "category": "binding"}]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    options = ["--held-out", tmp_path / "held_out.jsonl", "--judge", demo.FLOW["judge"], "--prompts-per-round", 8]
    out = few("run", "--reward", f"{tmp_path / 'mine.py'}:seen", *options)
    calls = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    train, other = {"a green two", "a blue nine"}, {row["prompt"] for row in held_out}
    assert [set(call) for call in calls] == [other, train, train, other, train]  # evaluation, round 1, evaluation
    row = lines(out)[1]
    assert {"joint/colouring", "joint/binding"} < row["eval"].keys() and "joint/binding" not in row["eval_train"]
    assert row["eval"]["joint"] == pytest.approx((row["eval"]["joint/colouring"] + row["eval"]["joint/binding"]) / 2)
    printed = capsys.readouterr().out
    assert re.search(r"\n +held-out prompts +training prompts\nreward ", printed)
    number = r"-?\d+\.\d{4}( ± [\d.]+)?"
    assert re.search(rf"\nw2 +{number} +-> +{number} +{number} +-> +{number}\njoint ", printed)


def test_only_images_that_pictures_show_are_kept():
    rows, found = {}, Evaluation({"reward": 1.0}, {"reward": 0.1}, torch.zeros(2 * 30, 3, 4, 4), None, torch.arange(100, 130))
    for round in (0, 10, 20, 30):
        values = train_flow.remember(rows, round, {"eval": found, "eval_train": found})
    assert values == {
        name + end: getattr(found, kind)
        for name in ("eval", "eval_train")
        for end, kind in (("", "values"), ("_error", "errors"))
    }
    assert [len(rows[round]["eval"].images) for round in rows] == [20, 2, 2, 20] and rows[30]["eval_train"].images is None
    assert rows[10]["eval"].rows.tolist() == [rows[0]["eval"].rows[5].item()] == [rows[30]["eval"].rows[5].item()]


def test_no_more_prompts_are_evaluated_than_asked_for(tmp_path, few):
    (tmp_path / "mine.py").write_text(SEEN.format(file=str(tmp_path / "seen")))
    (tmp_path / "nine.txt").write_text(
        "".join(f"a red {digit}\n" for digit in "one two three four five six seven eight nine".split())
    )
    few(
        "run",
        "--prompts",
        tmp_path / "nine.txt",
        "--rounds",
        0,
        "--eval-prompts",
        3,
        "--reward",
        f"{tmp_path / 'mine.py'}:seen",
    )
    assert json.loads((tmp_path / "seen").read_text()) == [f"a red {d}" for d in ("one", "five", "nine") for _ in range(2)]


def test_six_small_rounds_of_the_main_job_learn(tmp_path):
    small = "--rounds 6 --prompts-per-round 8 --eval-samples 4 --eval-prompts 24 --eval-every 6".split()
    train_flow.main(["--out", str(tmp_path / "run"), *small])
    first, last = lines(tmp_path / "run")[0]["eval"], lines(tmp_path / "run")[-1]["eval"]
    assert last["reward"] > first["reward"] + 3 and last["joint"] > first["joint"] + 0.08


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_main_job_learns(tmp_path, seed):
    train_flow.main(["--out", str(tmp_path / "run"), "--seed", str(seed)])
    first, last = lines(tmp_path / "run")[0]["eval"], lines(tmp_path / "run")[-1]["eval"]
    assert last["reward"] > first["reward"] + 8 and last["joint"] > first["joint"] + 0.25


@pytest.mark.cuda
def test_the_same_rollout_on_cuda(tmp_path):
    cpu, cuda = (train(tmp_path / device, "--device", device) for device in ("cpu", "cuda"))
    assert cuda["reward"] == pytest.approx(cpu["reward"], abs=0.5)
