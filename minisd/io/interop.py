"""A UNet of minisd inside diffusers' pipelines, and diffusers' UNet inside `StableDiffusion`. Imports neither."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from minisd.config import UNetConfig
from minisd.io.configs import read_config, to_dict
from minisd.unet import UNet


class Attributes(dict[str, Any]):
    """A dictionary whose keys are attributes too, as diffusers' configurations are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class ForDiffusers(nn.Module):
    """Wraps a UNet to be called like diffusers' `UNet2DConditionModel`: `pipe.unet = ForDiffusers(sd.unet)`."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet
        self.config = Attributes(to_dict(unet.config))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.unet.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.unet.parameters()).device

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Predict like `UNet.forward`. Raises ValueError for arguments of diffusers that UNets here do not have."""
        if used := [name for name, value in others.items() if value is not None and value != {}]:
            raise ValueError(f"a UNet of minisd does not support {', '.join(used)}; omit it")
        timesteps = torch.as_tensor(timestep, device=sample.device)
        prediction = self.unet(sample, timesteps, encoder_hidden_states)
        return SimpleNamespace(sample=prediction) if return_dict else (prediction,)


class FromDiffusers(UNet):
    """Wraps diffusers' `UNet2DConditionModel` to be called like a UNet of minisd: `sd.unet = FromDiffusers(unet)`.

    Feature reuse, attention maps and LoRAs, which need the blocks of `UNet`, are not available with it.
    """

    def __init__(self, unet: Any) -> None:
        """Wrap a UNet. Raises ValueError if its configuration is not that of a Stable Diffusion 1 or 2."""
        nn.Module.__init__(self)  # without the blocks of UNet
        config: Any = getattr(unet, "config", None)
        if not isinstance(unet, nn.Module) or not isinstance(config, Mapping):
            raise TypeError(f"expected diffusers' UNet2DConditionModel, got {type(unet).__name__}")
        self.config, self.unet = read_config(UNetConfig, dict(config)), unet

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        prediction: Tensor = self.unet(latents, timesteps, encoder_hidden_states=context, return_dict=False)[0]
        return prediction
