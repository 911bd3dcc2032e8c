"""sample: grids and single images, adapters, text, refusals."""

import json

import pytest
import tiny
import tiny_omni
import tiny_sd3
import torch

from nano_adrpo import errors, lora, sample
from nano_adrpo.demo import HERE
from nano_adrpo.files import png
from nano_adrpo.files.wav import write_wav
from nano_adrpo.language.audio import AudioCodec
from nano_adrpo.language.chat import TextCodec
from nano_adrpo.models.decoder import Decoder
from nano_adrpo.models.omni import Omni
from nano_adrpo.text_to_image import TextToImage
from nano_adrpo.text_to_image.sd3 import PromptEncoder

BASE, ADDER = HERE / "base", HERE / "arithmetic_base"


def run(*options):
    sample.main([str(option) for option in options])


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a green two\na blue nine\n")
    return tmp_path / "prompts.txt"


def test_single_images_and_a_grid_are_the_same_images(tmp_path, prompts):
    options = ["--model", BASE, "--prompts", prompts, "--count", 3, "--steps", 2]
    for name in ("a", "b"):
        run(*options, "--out", tmp_path / name)
    names = [f"{row:04d}_{column:02d}.png" for row in (0, 1) for column in (0, 1, 2)]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    run(*options, "--out", tmp_path / "deep" / "grid.png")
    grid = png.read_png(tmp_path / "deep" / "grid.png")
    assert grid.shape == (3, 2 * 16 + 2, 3 * 16 + 4)
    assert torch.equal(grid[:, 18:, 18:34], png.read_png(tmp_path / "a" / "0001_01.png"))
    run(*options, "--guidance", 0, "--out", tmp_path / "unguided")
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "unguided" / name).read_bytes() for name in names)
    run(*options, "--batch", 1, "--seed", 1, "--out", tmp_path / "c")
    assert (tmp_path / "a" / names[0]).read_bytes() != (tmp_path / "c" / names[0]).read_bytes()


def test_images_are_the_models(tmp_path):
    run("--model", BASE, "--prompt", "a green two", "--steps", 3, "--dtype", "float32", "--out", tmp_path / "two.png")
    model = TextToImage.from_pretrained(BASE, torch.float32)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    condition = model.encode(["a green two"])
    with torch.no_grad():
        for t in (0, 1 / 3, 2 / 3):  # Euler
            x = x + model.velocity(x, t, condition) / 3
    assert (png.read_png(tmp_path / "two.png") - x[0].clamp(-1, 1)).abs().max() < 1.1 / 255


def write_adapter(model, targets, folder):
    lora.add(model, targets, 2, 2, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(3.0)
    lora.save(model, folder)
    return folder


def test_an_adapter_changes_the_images(tmp_path):
    adapter = write_adapter(TextToImage.from_pretrained(BASE).transformer, lora.MMDIT_TARGETS, tmp_path / "adapter")
    options = ["--model", BASE, "--prompt", "a green two", "--steps", 2]
    run(*options, "--out", tmp_path / "base.png")
    run(*options, "--adapter", adapter, "--out", tmp_path / "tuned.png")
    assert (tmp_path / "base.png").read_bytes() != (tmp_path / "tuned.png").read_bytes()


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return tiny_sd3.folder(tmp_path_factory.mktemp("sd3"))


def test_sd3_with_guidance_in_tiles_and_without_t5(tmp_path, sd3, capsys):
    options = ["--model", sd3, "--prompt", "a cat", "--steps", 2, "--resolution", 32, "--count", 2, "--batch", 1]
    changes = ([], ["--guidance", 4], ["--guidance", 4, "--negative-prompt", "the one"], ["--t5", "zeros"], ["--tile", 2])
    for i, change in enumerate(changes):
        run(*options, *change, "--out", tmp_path / f"{i}.png")
    assert len({(tmp_path / f"{i}.png").read_bytes() for i in range(len(changes))}) == len(changes)
    run(*options, "--t5", "stream", "--out", tmp_path / "streamed.png")
    assert (tmp_path / "streamed.png").read_bytes() == (tmp_path / "0.png").read_bytes()
    assert png.read_png(tmp_path / "0.png").shape == (3, 32, 2 * 32 + 2)
    assert "1/2 images" in (printed := capsys.readouterr().out) and "2/2 images" in printed


def test_a_single_file_with_a_base(tmp_path, sd3):
    file = tiny_sd3.single_file(tmp_path / "sd3_medium.safetensors", sd3, ["transformer", "vae"])
    for name, model in (("folder", [sd3]), ("file", [file, "--base", sd3])):
        run("--model", *model, "--prompt", "a cat", "--steps", 2, "--resolution", 16, "--out", tmp_path / f"{name}.png")
    a, b = (png.read_png(tmp_path / f"{name}.png") for name in ("folder", "file"))
    assert (a - b).abs().max() < 2.1 / 255


def test_images_are_written_as_they_are_drawn(tmp_path, prompts, monkeypatch):
    decode, parts = TextToImage.decode, []

    def interrupted(model, latents, tile):
        parts.append(len(latents))
        if len(parts) == 3:
            raise KeyboardInterrupt
        return decode(model, latents, tile)

    monkeypatch.setattr(TextToImage, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--model", BASE, "--prompts", prompts, "--count", 3, "--batch", 2, "--steps", 1, "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"000{i // 3}_0{i % 3}.png" for i in range(4)]


def test_the_empty_prompt_is_one(tmp_path, sd3):
    run("--model", sd3, "--prompt", "", "--steps", 1, "--resolution", 16, "--out", tmp_path / "x.png")
    assert png.read_png(tmp_path / "x.png").shape == (3, 16, 16)


def test_text_is_the_decoders(capsys, tmp_path):
    options = ["--model", ADDER, "--prompt", "12+39=", "--max-new-tokens", 22]
    run(*options, "--temperature", 0, "--count", 2)
    printed = capsys.readouterr().out
    model = Decoder.from_pretrained(ADDER)
    codec = TextCodec(model)
    ids, mask = codec.encode(["12+39="], 64)
    full, kept = model.generate(ids, mask, 22, temperature=0, eos=codec.eos)
    text = codec.decode(full[:, ids.shape[1] :], kept)[0]
    assert printed == f"> 12+39=\n{text}\n\n" * 2 and "####" in text
    adapter = write_adapter(model, lora.DECODER_TARGETS, tmp_path / "adapter")
    run(*options, "--temperature", 0, "--adapter", adapter)
    assert capsys.readouterr().out != f"> 12+39=\n{text}\n\n"
    run("--model", ADDER, "--prompt", "12+39=", "--temperature", 0)  # the default length fits the model's 64 positions
    assert capsys.readouterr().out == f"> 12+39=\n{text}\n\n"


def test_a_prompt_that_is_too_long_is_told_before_anything_is_generated(tmp_path, monkeypatch):
    monkeypatch.setattr(Decoder, "generate", lambda *_: pytest.fail("work has begun"))
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "%s"}\n' % ("1" * 99))
    with pytest.raises(ValueError, match="prompt 1 has 99 tokens; expected 1 … 42"):
        run("--model", ADDER, "--prompts", tmp_path / "p.jsonl", "--batch", 1, "--max-new-tokens", 22, "--count", 2)


def test_text_goes_into_a_file_with_its_rows(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"question": "12+39=", "answer": "51"}\n{"question": "45+18=", "category": "b"}\n')
    options = ["--model", ADDER, "--prompts", tmp_path / "p.jsonl", "--max-new-tokens", 22, "--count", 2]
    run(*options, "--out", tmp_path / "deep" / "out.jsonl")
    assert capsys.readouterr().out == ""
    rows = [json.loads(line) for line in (tmp_path / "deep" / "out.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == ["12+39=", "12+39=", "45+18=", "45+18="]
    assert rows[1]["answer"] == "51" and rows[2]["category"] == "b"
    run(*options)
    assert capsys.readouterr().out == "".join(f"> {row['question']}\n{row['completion']}\n\n" for row in rows)
    with pytest.raises(ValueError, match="out.jsonl: the file exists; expected a new one"):
        run(*options, "--out", tmp_path / "deep" / "out.jsonl")
    with pytest.raises(ValueError, match='p.jsonl, line 1: expected an object with a text "prompt"'):
        run("--model", BASE, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "images")  # an image has no question


def test_every_option_of_sampling_counts(capsys, tmp_path):
    def printed(*options):
        run("--model", ADDER, "--prompt", "12+39=", "--max-new-tokens", 22, "--count", 5, *options)
        return capsys.readouterr().out

    base = printed()
    assert base.count("> 12+39=") == 5 and printed("--seed", 0) == base
    for options in (["--seed", 1], ["--temperature", 0.3], ["--top-k", 1], ["--top-p", 0.3], ["--max-new-tokens", 5]):
        assert printed(*options) != base, options
    assert "#" in base and "#" not in printed("--stop", "####")
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %}r{% endif %}")
    assert printed("--chat-template", template) == printed("--chat-template", "none") == base
    for options in (["--system", "4"], ["--thinking", "on"]):
        assert printed("--chat-template", template, *options) != base, options
    assert len(set(printed("--top-k", 1).split("> 12+39=\n")[1:])) == 1


def test_an_answer_to_a_question_about_a_sound(tmp_path, capsys):
    folder = tiny_omni.folder(tmp_path / "omni")
    for name, seconds in (("a", 0.2), ("b", 2)):
        write_wav(tmp_path / f"{name}.wav", tiny_omni.clip(seconds))
    model = Omni.from_pretrained(folder)
    codec, texts, generator = AudioCodec(model), [], torch.Generator().manual_seed(0)
    for sound in (tmp_path / "a.wav", tmp_path / "b.wav", None):
        ids, mask = codec.encode([("What?", sound)], 500)
        clips = [clip for row in codec.clips([("What?", sound)]) for clip in row]
        full, kept = model.generate(ids, mask, 8, eos=codec.eos, generator=generator, clips=clips)
        texts += codec.decode(full[:, ids.shape[1] :], kept)
    assert len(set(texts)) == 3
    options = ["--model", folder, "--max-new-tokens", 8, "--batch", 1]
    for sound, heard in (("a", True), ("b", False)):
        run(*options, "--prompt", "What?", "--audio", tmp_path / f"{sound}.wav")
        printed = errors.shown(f"> What?\n{texts[0]}\n\n", keep="\n\t")  # bytes that no terminal obeys
        assert (capsys.readouterr().out == printed) == heard
    lines = [{"question": "What?", "audio": "a.wav"}, {"question": "What?", "audio": "b.wav"}, {"question": "What?"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(*options, "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows] == texts and rows[1]["audio"] == "b.wav"
    (tmp_path / "p.jsonl").write_text('{"question": "What?", "audio": 3}\n')
    with pytest.raises(ValueError, match="p.jsonl, prompt 1: key 'audio' is 3; expected the path of a sound"):
        run(*options, "--prompts", tmp_path / "p.jsonl")


REFUSED = (
    (["--model", BASE, "--out", "x"], "--prompt and --prompts: expected one of them"),
    (["--model", BASE, "--prompt", "a", "--prompts", "b", "--out", "x"], "--prompt and --prompts: expected one of them"),
    (["--model", BASE, "--prompt", "a"], "--out: expected FILE.png or a folder"),
    (["--model", "nowhere", "--prompt", "a", "--out", "x.png"], "nowhere: no such file or folder; expected a folder"),
    (["--model", BASE, "--prompts", "nowhere", "--out", "x.png"], "nowhere: no such file"),
    # Options that cannot act on what the model makes.
    *(
        (["--model", ADDER, "--prompt", "a", option, *value], f"{option}: expected only where --model draws images")
        for option, *value in (
            ("--steps", 3),
            ("--shift", 2),
            ("--guidance", 3),
            ("--negative-prompt", "x"),
            ("--resolution", 8),
            ("--t5", "zeros"),
            ("--tile", 8),
            ("--base", "x"),
            ("--lower-case",),
            ("--no-lower-case",),
        )
    ),
    *(
        (
            ["--model", BASE, "--out", "x.png", "--prompt", "a", option, value],
            f"{option}: expected only where --model writes text",
        )
        for option, value in (
            ("--max-new-tokens", 3),
            ("--temperature", 2),
            ("--top-k", 3),
            ("--top-p", 0.5),
            ("--system", "x"),
            ("--stop", "x"),
            ("--chat-template", "none"),
            ("--thinking", "on"),
        )
    ),
    (["--model", BASE, "--prompt", "a", "--out", "x.png", "--negative-prompt", "b"], "expected only with --guidance above 1"),
    (["--model", BASE, "--prompt", "a", "--out", "x.png", "--tile", 4], "--tile: expected only with a model that has an auto"),
    (["--model", BASE, "--prompt", "a", "--out", "x.png", "--t5", "stream"], "has no T5; expected load, the default"),
    (["--model", ADDER, "--prompt", "a", "--temperature", 0, "--top-k", 3], "--top-k: expected only with --temperature above"),
    (
        ["--model", ADDER, "--prompt", "a", "--temperature", 0, "--top-p", 0.5],
        "--top-p: expected only with --temperature above",
    ),
    (["--model", BASE, "--prompt", "a", "--resolution", 9, "--out", "x.png"], "resolution 9: expected a multiple of 4"),
    (
        ["--model", BASE, "--prompt", "a", "--adapter", "nowhere", "--out", "x.png"],
        "nowhere: no such file or folder; expected an adapter's",
    ),
    (
        ["--model", BASE, "--prompt", "a", "--seed", 2**64, "--out", "x.png"],
        "argument --seed: 18446744073709551616 is not a",
    ),
    (["--model", BASE, "--prompt", "a", "--out", f"{__file__}/x.png"], "x.png: cannot write there (File exists)"),
    (["--model", ADDER, "--prompt", "a", "--audio", "x.wav"], "--audio: expected only with Qwen2.5-Omni's folder as --model"),
    (["--model", ADDER, "--prompts", "a", "--audio", "x.wav"], "--audio: expected only with --prompt; a file of prompts has"),
    (["--model", ADDER, "--prompt", "a", "--out", "x"], "--out x: expected FILE.jsonl, or none, since --model writes text"),
    (
        ["--model", ADDER, "--prompt", "a", "--max-new-tokens", 64],
        "--max-new-tokens 64: expected less than the model's 64 positions",
    ),
    (["--model", ADDER, "--prompt", "a", "--max-new-tokens", 5, "--top-p", 2], "top_p is 2.0; expected above 0 and at"),
)


def test_bad_options_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for options, message in REFUSED:
        with pytest.raises(SystemExit) as stop:
            errors.run_command(lambda options=options: run(*options))
        line = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and line.startswith("error: ") and message in line, options
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "kept.png").write_bytes(b"mine")
    options = ["--model", BASE, "--prompt", "a", "--steps", 1]
    with pytest.raises(ValueError, match="kept.png: the file exists"):
        run(*options, "--out", tmp_path / "kept.png")
    with pytest.raises(ValueError, match="the folder is not empty"):
        run(*options, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.png"] and (tmp_path / "kept.png").read_bytes() == b"mine"


def test_an_adapter_of_another_model_is_named(tmp_path, sd3):
    adapter = write_adapter(TextToImage.from_pretrained(sd3, encoders=False).transformer, ["to_q"], tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"key 'base_model.model.transformer_blocks.0.attn.*' has shape \[2, 128\]; expected \[2, 96\]"
    ):
        run("--model", BASE, "--prompt", "a", "--adapter", adapter, "--out", tmp_path / "x.png")


def test_what_does_not_fit_is_told_before_prompts_are_encoded(tmp_path, sd3, monkeypatch):
    adapter = write_adapter(TextToImage.from_pretrained(BASE, encoders=False).transformer, ["to_q"], tmp_path / "adapter")
    monkeypatch.setattr(PromptEncoder, "from_pretrained", lambda *_, **options: pytest.fail("an encoder was loaded"))
    changes = {"resolution 40: expected a multiple of 16": ["--resolution", 40], "has shape": ["--adapter", adapter]}
    for message, options in changes.items():
        with pytest.raises(ValueError, match=message):
            run("--model", sd3, "--prompt", "a cat", *options, "--out", tmp_path / "x.png")


def test_kinds_of_models_are_told_apart(tmp_path):
    assert sample.is_decoder(ADDER) and not sample.is_decoder(BASE) and not sample.is_decoder(tmp_path)
    with pytest.raises(ValueError, match="clip/config.json: 'model_type' is 'clip'; expected one of qwen2, .*, or a folder in"):
        sample.is_decoder(HERE / "clip")
    tiny.write_json(tmp_path / "config.json", {"model_type": "qwen2"})
    assert sample.is_decoder(tmp_path)
