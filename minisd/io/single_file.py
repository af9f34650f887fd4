"""Writing a model as one file in CompVis layout, for AUTOMATIC1111's web UI, ComfyUI and other programs."""

from __future__ import annotations

import os
import re
from functools import partial

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minisd.config import ModelConfig
from minisd.features.tiny_autoencoder import TinyAutoencoderConfig
from minisd.features.validate import check_path
from minisd.generate import Model
from minisd.io.atomic import save_atomically
from minisd.io.key_names import single_file_sources

POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
# The original autoencoder's attention consists of 1×1 convolutions, whose weights have four dimensions.
CONVOLUTIONS = re.compile(r"first_stage_model\.\w+\.mid\.attn_1\.(q|k|v|proj_out)\.weight")


def save_single_file(model: Model, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Save a model as one .safetensors file in CompVis layout.

    The metadata name the architecture and the prediction type, in the keys of Stability AI's model specification.

    Args:
        model: The model to save.
        path: The file, which is replaced atomically.
        dtype: The dtype of the saved weights. Defaults to that of the model.

    Raises:
        ValueError: If the layout has no place for a part of the model, or the name does not end in .safetensors.
    """
    target = check_path("path", path)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} is not the name of a single file; expected one ending in .safetensors")
    if model.tokenizer.added:
        words = ", ".join(model.tokenizer.added)
        raise ValueError(f"a single file has no place for the words {words}; save a folder, or load a model without")
    if isinstance(model.config.autoencoder, TinyAutoencoderConfig):
        raise ValueError("a single file has no place for TAESD; load the model with its own autoencoder")
    target.parent.mkdir(parents=True, exist_ok=True)
    state = {
        key: value.to("cpu", dtype if value.is_floating_point() else None).contiguous()
        for key, value in single_file_state(model).items()
    }
    save_atomically(partial(save_file, state, metadata=_metadata(model.config)), target)


def single_file_state(model: Model) -> dict[str, Tensor]:
    """Return all weights under the keys of the original code.

    A text encoder with GELU is OpenCLIP's, whose keys differ and whose query, key and value are stacked. Its last
    layer, projection and temperature, which Stable Diffusion 2 does not use, are left out.
    """
    openclip = model.config.text_encoder.hidden_act == "gelu"
    parts: dict[str, nn.Module] = {"text_encoder": model.text_encoder, "vae": model.autoencoder, "unet": model.unet}
    state: dict[str, Tensor] = {} if openclip else {POSITIONS: torch.arange(77)[None]}
    stacked: dict[str, list[Tensor]] = {}
    for part, module in parts.items():
        for name, parameter in module.state_dict().items():
            key, index = single_file_sources(part, name, model.config)[-1 if openclip else 0]
            if index is not None:
                stacked.setdefault(key, [parameter] * 3)[index] = parameter
            else:
                state[key] = parameter[:, :, None, None] if CONVOLUTIONS.fullmatch(key) else parameter
    return state | {key: torch.cat(values) for key, values in stacked.items()}


def _metadata(config: ModelConfig) -> dict[str, str]:
    prediction = {"v_prediction": "v", "epsilon": "epsilon"}.get(config.schedule.prediction_type, "sample")
    pixels = config.unet.sample_size * config.autoencoder.downscale
    second = f"stable-diffusion-v2-{pixels}{'-v' if prediction == 'v' else ''}"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": second if config.text_encoder.hidden_act == "gelu" else "stable-diffusion-v1",
        "modelspec.prediction_type": prediction,
        "modelspec.resolution": f"{pixels}x{pixels}",
    }
