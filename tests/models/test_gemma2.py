"""Gemma 2: its caps, its window, and the hidden states without a head. What it shares with its family is in test_decoder.py."""

import json
from pathlib import Path

import pytest
import tiny
import tiny_sana
import torch
from safetensors.torch import load_file, save_file

from nano_adrpo.models.decoder import Config, Decoder, TextEncoder

GOLDEN = json.loads((Path(tiny.__file__).parent / "golden.json").read_text())
IDS = tiny_sana.ids()


def folder(path, **changes):
    """A folder as Gemma2ForCausalLM saves it: the head is the embeddings."""
    sizes = tiny_sana.GEMMA2 | dict(tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh")
    model = Decoder(Config("gemma2", **sizes | changes))
    tiny.fill(model.model)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("prefix", ["model.", ""])
@torch.no_grad()
def test_hidden_states(tmp_path, prefix):
    path = folder(tmp_path / "whole")
    file = path / "model.safetensors"
    save_file({prefix + key.removeprefix("model."): tensor for key, tensor in load_file(file).items()}, file)
    model = TextEncoder.from_pretrained(path)
    assert model(IDS)[:, :, ::5].flatten().tolist() == pytest.approx(GOLDEN["gemma2"]["hidden"], abs=1e-4)
    logits = Decoder.from_pretrained(path)(IDS)  # the head is the embeddings, whether or not the keys have a prefix
    assert logits[:, :, ::7].flatten().tolist() == pytest.approx(GOLDEN["gemma2"]["logits"], abs=1e-4)
    padded, mask = torch.cat([IDS, IDS], dim=1), torch.tensor([[1] * 8 + [0] * 8] * 2)
    torch.testing.assert_close(model(padded, mask)[:, :8], model(IDS), atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "out")  # as Gemma2Model's
    assert {key.partition(".")[0] for key in load_file(tmp_path / "out" / "model.safetensors")} == {
        "embed_tokens", "layers", "norm",
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Gemma2Model"]
    assert torch.equal(TextEncoder.from_pretrained(tmp_path / "out")(IDS), model(IDS))
    assert torch.equal(Decoder.from_pretrained(tmp_path / "out")(IDS), logits)


def test_other_classes_heads_are_passed_over(tmp_path):
    path = folder(tmp_path / "whole")
    file = path / "model.safetensors"
    expected, tensors = TextEncoder.from_pretrained(path)(IDS), load_file(file)
    for head in ("lm_head.weight", "score.weight"):
        save_file(tensors | {head: torch.ones(1, 20)}, file)
        assert torch.equal(TextEncoder.from_pretrained(path)(IDS), expected)


def test_caps(tmp_path):
    model = Decoder.from_pretrained(folder(tmp_path / "model"))
    free = Decoder.from_pretrained(folder(tmp_path / "free", final_logit_softcapping=1e9))
    assert model(IDS).abs().max() < 1.5 < free(IDS).abs().max()
    torch.testing.assert_close(model(IDS), 1.5 * (free(IDS) / 1.5).tanh(), atol=1e-5, rtol=0)
    # Scores far below the cap are not bent: as without a cap, which is torch's own attention.
    wide = folder(tmp_path / "wide", attn_logit_softcapping=1e5)
    plain = json.loads((wide / "config.json").read_text()) | {"attn_logit_softcapping": None}
    bent = Decoder.from_pretrained(wide)(IDS)
    (wide / "config.json").write_text(json.dumps(plain))
    torch.testing.assert_close(Decoder.from_pretrained(wide)(IDS), bent, atol=1e-3, rtol=0)
    assert (bent - model(IDS)).abs().max() > 0.01


def test_texts_beyond_the_window_are_refused(tmp_path):
    model = Decoder.from_pretrained(folder(tmp_path / "model", sliding_window=8))
    assert model.config.positions == 8 and model(IDS).isfinite().all()
    for call in (lambda: model(torch.cat([IDS, IDS], dim=1)), lambda: model.generate(IDS, None, 1)):
        with pytest.raises(ValueError, match="expected at most 8, which all|exceed the model's 8 positions"):
            call()
    model.save_pretrained(tmp_path / "out")
    assert Decoder.from_pretrained(tmp_path / "out").config == model.config
