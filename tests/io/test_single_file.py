"""Single files in CompVis layout: the keys and tensors of the reference implementation, and readers that load them."""

from __future__ import annotations

import pytest
import torch
from checkpoints import SMALL, SMALL_2, compvis_state, make_parts, write_folder
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from minisd import SD15, SD15_INPAINT, SD21, Autoencoder, StableDiffusion, TextEncoder, Tokenizer, UNet
from minisd.features.textual_inversion import add_word
from minisd.generate import Model
from minisd.io.single_file import single_file_state

# what readers compute, and what OpenCLIP has for training only
LEFT_OUT = {"betas", "alphas_cumprod", "cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale"}


@pytest.mark.parametrize("config", [SMALL, SMALL_2], ids=["sd1", "sd2"])
def test_single_file_that_is_saved(tmp_path, config):
    """The reference's tensors bit for bit; diffusers converts the file back to its own folder."""
    parts, path = make_parts(config), tmp_path / "model.safetensors"
    folder = write_folder(tmp_path / "model", parts)
    sd = StableDiffusion.from_pretrained(folder, device="cpu")
    sd.save_single_file(path)
    saved, expected = load_file(path), compvis_state(parts, openclip=config is SMALL_2)
    assert saved.keys() == expected.keys() - LEFT_OUT
    for key, value in saved.items():
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key
    theirs = StableDiffusionPipeline.from_single_file(
        str(path), config=str(folder), local_files_only=True, safety_checker=None
    )
    again = StableDiffusion.from_pretrained(path, device="cpu", config=sd.config)
    for name, other in (("unet", theirs.unet), ("text_encoder", theirs.text_encoder), ("autoencoder", theirs.vae)):
        state = {key.removeprefix("text_model."): value for key, value in other.state_dict().items()}
        for key, value in getattr(again, name).state_dict().items():
            assert torch.equal(value, state[key.removeprefix("text_model.")]), key
    with safe_open(path, "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "epsilon"
    sd.save_single_file(path, torch.float16)
    assert {value.dtype for value in load_file(path).values()} <= {torch.float16, torch.int64}


@pytest.mark.parametrize("config", [SD15, SD15_INPAINT, SD21], ids=["SD15", "SD15_INPAINT", "SD21"])
def test_keys_and_shapes_at_full_size(config):
    openclip = config.text_encoder.hidden_size == 1024
    expected = compvis_state(make_parts(config, meta=True), openclip)
    with torch.device("meta"):
        networks = TextEncoder(config.text_encoder), UNet(config.unet), Autoencoder(config.autoencoder)
    state = single_file_state(Model(config, Tokenizer.from_pretrained(), *networks))
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in expected.items() if key not in LEFT_OUT
    }
    assert len(state) == (1131 if not openclip else 686 + 248 + 23 * 12 + 4)  # as published, but for OpenCLIP's rest


def test_what_a_single_file_has_no_place_for(small_model, tmp_path):
    sd = StableDiffusion.from_pretrained(small_model, device="cpu")
    with pytest.raises(ValueError, match="expected one ending in .safetensors"):
        sd.save_single_file(tmp_path / "model.ckpt")
    sd.tokenizer = add_word(sd.tokenizer, sd.text_encoder, "<it>", torch.ones(1, sd.config.text_encoder.hidden_size))
    with pytest.raises(ValueError, match="no place for the words <it>"):
        sd.save_single_file(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
