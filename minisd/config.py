"""Model configurations. Field names match published `config.json` files (read by `minisd.io.configs`)."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TextEncoderConfig:
    """CLIP text encoder. Defaults: ViT-L/14, used by Stable Diffusion 1."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class AutoencoderConfig:
    """KL autoencoder. Defaults: Stable Diffusion, which maps 3×512×512 images to 4×64×64 latents."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215  # latents are multiplied by this so that they have about unit variance

    @property
    def downscale(self) -> int:
        """Downsampling factor from images to latents: 8 for Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class UNetConfig:
    """UNet. Defaults: Stable Diffusion 1, with 860 M parameters."""

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 64
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple[int, ...] = 8  # despite its name, the number of heads, overall or per level
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    upcast_attention: bool = False

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads at each level."""
        heads = self.attention_head_dim
        return heads if isinstance(heads, tuple) else (heads,) * len(self.block_out_channels)


@dataclass(frozen=True)
class ScheduleConfig:
    """Noise schedule and prediction type of the UNet: "epsilon", "v_prediction" or "sample" (clean latents)."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None  # if None, each sampler uses its own default
    steps_offset: int = 1  # added to timesteps with "leading" spacing
    set_alpha_to_one: bool | None = False  # end at σ = 0 (True) or that of timestep 0; None: DDIM True, PNDM False
    rescale_betas_zero_snr: bool = False  # for v-prediction: rescale ᾱ to (nearly) 0 at the last timestep


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of a complete Stable Diffusion model."""

    text_encoder: TextEncoderConfig = TextEncoderConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    unet: UNetConfig = UNetConfig()
    schedule: ScheduleConfig = ScheduleConfig()


SD15 = ModelConfig()
SD15_INPAINT = ModelConfig(unet=UNetConfig(in_channels=9))

# Stable Diffusion 2 uses the penultimate layer of OpenCLIP ViT-H/14, so the last of its 24 layers is left out.
_OPENCLIP = TextEncoderConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
)
_UNET2 = UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
SD21_BASE = ModelConfig(text_encoder=_OPENCLIP, unet=_UNET2)
SD21 = ModelConfig(
    text_encoder=_OPENCLIP,
    autoencoder=AutoencoderConfig(sample_size=768),
    unet=replace(_UNET2, sample_size=96, upcast_attention=True),
    schedule=ScheduleConfig(prediction_type="v_prediction"),
)

# Normalization groups have at least 4 channels, as in Stable Diffusion: instance normalization (one channel per group)
# would remove the mean of each channel, and with it the color of a plain background.
TINY = ModelConfig(
    TextEncoderConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4),
    AutoencoderConfig(block_out_channels=(16, 32, 64, 128), layers_per_block=1, norm_num_groups=4, sample_size=192),
    UNetConfig(
        sample_size=24,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=(2, 4, 6),
        norm_num_groups=8,
    ),
    ScheduleConfig(prediction_type="v_prediction", timestep_spacing="trailing"),
)
