"""Random checkpoints written by diffusers and transformers, in every layout that minisd reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from minisd.config import AutoencoderConfig, ModelConfig, TextEncoderConfig, UNetConfig
from minisd.io.configs import to_dict

TOKENIZER = Path(__file__).parents[1] / "minisd/assets/tiny/tokenizer"

SMALL = ModelConfig(
    text_encoder=TextEncoderConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    autoencoder=AutoencoderConfig(block_out_channels=(16, 32, 32, 48), norm_num_groups=8, sample_size=64),
    unet=UNetConfig(
        sample_size=8,
        block_out_channels=(32, 48, 64, 64),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=32,
    ),
)
SMALL_2 = replace(
    SMALL,
    text_encoder=replace(SMALL.text_encoder, hidden_act="gelu"),
    unet=replace(SMALL.unet, use_linear_projection=True, attention_head_dim=(2, 3, 4, 4)),
)


@dataclass
class Parts:
    """diffusers' and transformers' modules, the reference that minisd is compared with."""

    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel

    def items(self) -> list[tuple[str, nn.Module]]:
        return [("text_encoder", self.text_encoder), ("vae", self.vae), ("unet", self.unet)]


def make_parts(config: ModelConfig, seed: int = 0, scale: float = 1.0, meta: bool = False) -> Parts:
    """diffusers' modules of the given sizes; the weights are random and `scale` times He's, or on the meta device."""
    text = CLIPTextConfig(
        **to_dict(config.text_encoder) | {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
    )
    with torch.device("meta"):
        parts = Parts(
            CLIPTextModel(text),
            AutoencoderKL.from_config(to_dict(config.autoencoder)),
            UNet2DConditionModel.from_config(to_dict(config.unet)),
        )
    if meta:
        return parts
    generator = torch.Generator().manual_seed(seed)
    for _, module in parts.items():
        module.to_empty(device="cpu").eval().requires_grad_(False)
        for name, value in module.named_parameters():
            randomise(name, value, scale, generator)
        for name, value in module.named_buffers():
            if name.endswith("position_ids"):
                value.copy_(torch.arange(value.shape[-1]).expand_as(value))
    return parts


def randomise(name: str, value: Tensor, scale: float, generator: torch.Generator) -> None:
    """Fill a parameter so that no two layers or channels look alike, and no norm is the identity."""
    value.normal_(generator=generator)
    if value.ndim > 1:
        value.mul_(0.02 if "embedding.weight" in name else scale * value[0].numel() ** -0.5)
    else:
        value.mul_(0.1).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def make_pipeline(parts: Parts, **scheduler: Any) -> StableDiffusionPipeline:
    """diffusers' pipeline around the parts, with DDIM as Stable Diffusion configures it."""
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    settings = schedule | {"clip_sample": False, "set_alpha_to_one": False} | scheduler
    return StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        unet=parts.unet,
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        scheduler=DDIMScheduler(**settings),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_folder(
    folder: Path, parts: Parts, dtype: torch.dtype = torch.float32, variant: str | None = None, **options: Any
) -> Path:
    """A diffusers folder as diffusers writes it."""
    make_pipeline(parts).to(dtype).save_pretrained(folder, variant=variant, **options)
    return folder


def prefix_text_encoder(folder: Path, position_ids: bool = False) -> None:
    """Give the text encoder's keys the prefix that published files have, and the position ids that some have."""
    path = folder / "text_encoder/model.safetensors"
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(path).items()}
    if position_ids:
        state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, path, metadata={"format": "pt"})


def pickle_folder(folder: Path) -> None:
    """Turn every safetensors file into the .bin that older versions of the libraries wrote."""
    for path in list(folder.rglob("*.safetensors")):
        name = "pytorch_model.bin" if path.name == "model.safetensors" else path.with_suffix(".bin").name
        torch.save(dict(load_file(path)), path.with_name(name))
        path.unlink()


def age_autoencoder(folder: Path) -> None:
    """Give the autoencoder's attention the names that diffusers used before version 0.18."""
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in load_file(path).items():
        for new_name, old_name in old.items():
            key = key.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
        state[key] = value
    save_file(state, path, metadata={"format": "pt"})


def compvis_state(parts: Parts, openclip: bool = False) -> dict[str, Tensor]:
    """All tensors under the names of the reference implementation (OpenCLIP's for the text encoder of SD 2)."""
    state = {f"model.diffusion_model.{key}": value for key, value in _compvis_unet(parts.unet).items()}
    state |= {f"first_stage_model.{key}": value for key, value in _compvis_autoencoder(parts.vae).items()}
    text = {key.removeprefix("text_model."): value for key, value in parts.text_encoder.state_dict().items()}
    if openclip:
        state |= {f"cond_stage_model.model.{key}": value for key, value in _openclip(text).items()}
    else:
        state |= {f"cond_stage_model.transformer.text_model.{key}": value for key, value in text.items()}
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    state |= {"betas": betas.float(), "alphas_cumprod": (1 - betas).cumprod(0).float()}
    return {key: value.contiguous() for key, value in state.items()}


def _compvis_unet(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Walk the modules in the order in which the reference's constructor lists them, counting blocks as it does."""
    state: dict[str, Tensor] = {}

    def put(prefix: str, module: nn.Module) -> None:
        inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
        inner |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
        for key, value in module.state_dict().items():
            head, _, tail = key.partition(".")
            is_resnet = type(module).__name__ == "ResnetBlock2D"
            state[f"{prefix}.{inner[head] if is_resnet else head}.{tail}" if tail else f"{prefix}.{key}"] = value

    put("time_embed.0", unet.time_embedding.linear_1)
    put("time_embed.2", unet.time_embedding.linear_2)
    inputs: list[list[tuple[str, nn.Module]]] = [[("0", unet.conv_in)]]
    for down in unet.down_blocks:
        for i, resnet in enumerate(down.resnets):
            inputs.append([("0", resnet)])
            if hasattr(down, "attentions"):
                inputs[-1].append(("1", down.attentions[i]))
        for sampler in down.downsamplers or ():
            inputs.append([("0.op", sampler.conv)])
    outputs: list[list[tuple[str, nn.Module]]] = []
    for up in unet.up_blocks:
        for i, resnet in enumerate(up.resnets):
            outputs.append([("0", resnet)])
            if hasattr(up, "attentions"):
                outputs[-1].append(("1", up.attentions[i]))
        for sampler in up.upsamplers or ():
            outputs[-1].append((f"{len(outputs[-1])}.conv", sampler.conv))
    mid = unet.mid_block
    middle = [("0", mid.resnets[0]), ("1", mid.attentions[0]), ("2", mid.resnets[1])]
    for name, blocks in (("input_blocks", inputs), ("output_blocks", outputs)):
        for i, block in enumerate(blocks):
            for sub, module in block:
                put(f"{name}.{i}.{sub}", module)
    for sub, module in middle:
        put(f"middle_block.{sub}", module)
    put("out.0", unet.conv_norm_out)
    put("out.2", unet.conv_out)
    return state


def _compvis_autoencoder(vae: AutoencoderKL) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, value in vae.state_dict().items():
        words = key.split(".")
        side, rest = words[0], words[1:]
        if rest[0] == "up_blocks":
            rest[1] = str(len(vae.decoder.up_blocks) - 1 - int(rest[1]))
        name = ".".join([side, *rest])
        for new, old in (
            ("down_blocks", "down"),
            ("up_blocks", "up"),
            ("downsamplers.0", "downsample"),
            ("upsamplers.0", "upsample"),
            ("mid_block.resnets.0", "mid.block_1"),
            ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"),
            ("resnets", "block"),
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
            ("conv_norm_out", "norm_out"),
            ("conv_shortcut", "nin_shortcut"),
        ):
            name = name.replace(new, old)
        is_projection = "attn_1" in name and name.endswith("weight") and value.ndim == 2
        state[name] = value[:, :, None, None] if is_projection else value
    return state


def _openclip(text: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "positional_embedding": text["embeddings.position_embedding.weight"],
        "ln_final.weight": text["final_layer_norm.weight"],
        "ln_final.bias": text["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
        "text_projection": torch.eye(text["final_layer_norm.bias"].shape[0]),
    }
    layers = 1 + max(int(key.split(".")[2]) for key in text if key.startswith("encoder.layers."))
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
    names |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for i in range(layers):
        source, target = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            fused = torch.cat([text[f"{source}.self_attn.{x}_proj.{kind}"] for x in "qkv"])
            state[f"{target}.attn.in_proj_{kind}"] = fused
            state |= {f"{target}.{new}.{kind}": text[f"{source}.{old}.{kind}"] for old, new in names.items()}
    return state
