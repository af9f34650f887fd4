"""Every size and number of a model, as data: frozen dataclasses with the keys of published `config.json` files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Self

# No size is larger than the first of these; what multiplies the layers to be built, or fills tables, is smaller still.
LARGEST = 2**20
LARGEST_OF = {
    "num_hidden_layers": 128,
    "layers_per_block": 16,
    "sample_size": 2**14,
    "num_train_timesteps": 100_000,
    "levels": 8,
}


@dataclass(frozen=True)
class Config:
    """What the four configurations share: reading from, and writing to, a diffusers or transformers dictionary."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def __post_init__(self) -> None:
        for item in fields(self):
            _check(item.name, getattr(self, item.name), item.default)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the fields of this configuration from a published `config.json`.

        Keys with no influence on the network are ignored. A key that asks for something this package does not build
        raises ValueError and names the key, its value and the values supported.
        """
        for key, supported in cls.FIXED.items():
            if key in values and values[key] not in supported:
                expected = " or ".join(repr(value) for value in supported)
                raise ValueError(f"config has {key}={_short(values[key])}; minisd builds only {key}={expected}")
        known = {item.name for item in fields(cls)}
        return cls(**{key: _freeze(value) for key, value in values.items() if key in known and value is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values, together with the one supported value of every fixed key."""
        own = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: supported[0] for key, supported in self.FIXED.items()} | own


def _freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check(name: str, value: Any, like: Any) -> None:
    """Raise ValueError unless a value is of the kind of another, the default, and no larger than makes sense."""
    if isinstance(value, tuple) and (isinstance(like, tuple) or name == "attention_head_dim"):
        if not 1 <= len(value) <= LARGEST_OF["levels"]:
            raise ValueError(f"{name} has {len(value)} entries; expected 1 to {LARGEST_OF['levels']}")
        for each in value:
            _check(name, each, like[0] if isinstance(like, tuple) else like)
    elif isinstance(like, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {_short(value)}; expected true or false")
    elif isinstance(like, int):
        least, most = 0 if name == "steps_offset" else 1, LARGEST_OF.get(name, LARGEST)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name} is {_short(value)}; expected a whole number from {least} to {most}")
    elif isinstance(like, float):
        if type(value) not in (int, float) or not 0 < value < LARGEST:  # so neither NaN nor infinite
            raise ValueError(f"{name} is {_short(value)}; expected a number above 0")
    elif not isinstance(value, str):
        raise ValueError(f"{name} is {_short(value)}; expected a text")


def _short(value: Any) -> str:
    plain = isinstance(value, (int, float, str)) and len(str(value)) < 50
    return repr(value) if plain else f"a {type(value).__name__}"


@dataclass(frozen=True)
class TextEncoderConfig(Config):
    """CLIP's text transformer. The defaults are ViT-L/14, the text encoder of Stable Diffusion 1."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {"model_type": ("clip_text_model",)}

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(f"hidden_act={self.hidden_act!r}; expected 'quick_gelu' (SD 1) or 'gelu' (SD 2)")
        _check_divisible("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)


@dataclass(frozen=True)
class AutoencoderConfig(Config):
    """The KL autoencoder. The defaults are Stable Diffusion 1's: 512×512×3 pixels to 64×64×4 latents."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu",),
        "mid_block_add_attention": (True,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
        "shift_factor": (None,),
        "latents_mean": (None,),
    }

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215

    def __post_init__(self) -> None:
        super().__post_init__()
        for channels in self.block_out_channels:
            _check_divisible("block_out_channels", channels, "norm_num_groups", self.norm_num_groups)

    @property
    def downscale(self) -> int:
        """Pixels per latent, along each side: 8 for Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)

    def to_dict(self) -> dict[str, Any]:
        levels = len(self.block_out_channels)
        blocks = {
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
        return super().to_dict() | blocks


@dataclass(frozen=True)
class UNetConfig(Config):
    """The denoiser. The defaults are Stable Diffusion 1's 860 M parameters.

    `attention_head_dim` is, in spite of its name, the number of heads: one for all levels, or one for each.
    """

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "act_fn": ("silu",),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "center_input_sample": (False,),
        "downsample_padding": (1,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
        "mid_block_scale_factor": (1,),
        "only_cross_attention": (False,),
        "dual_cross_attention": (False,),
        "transformer_layers_per_block": (1,),
        "num_attention_heads": (None,),
        "resnet_time_scale_shift": ("default",),
        "time_embedding_type": ("positional",),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "addition_embed_type": (None,),
        "encoder_hid_dim": (None,),
        "time_cond_proj_dim": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
    }

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 64
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple[int, ...] = 8
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    upcast_attention: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types", "heads"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries; expected {levels}, one per level")
        for name in (*self.down_block_types, *self.up_block_types):
            if name not in ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"):
                raise ValueError(
                    f"block type {name!r} is not one of Stable Diffusion 1's and 2's: (CrossAttn)Down/UpBlock2D"
                )
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            _check_divisible("block_out_channels", channels, "attention_head_dim (the number of heads)", heads)
            _check_divisible("block_out_channels", channels, "norm_num_groups", self.norm_num_groups)

    @property
    def heads(self) -> tuple[int, ...]:
        """The number of attention heads at each level."""
        if isinstance(self.attention_head_dim, int):
            return (self.attention_head_dim,) * len(self.block_out_channels)
        return self.attention_head_dim


@dataclass(frozen=True)
class ScheduleConfig(Config):
    """The noise schedule: how fast a picture turns to noise, and what the denoiser predicts."""

    FIXED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "trained_betas": (None,),
        "rescale_betas_zero_snr": (False,),
        "thresholding": (False,),
    }

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    clip_sample: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start={self.beta_start}, beta_end={self.beta_end}; expected 0 < beta_start ≤ beta_end < 1"
            )
        if self.beta_schedule not in ("scaled_linear", "linear"):
            raise ValueError(f"beta_schedule={self.beta_schedule!r}; expected 'scaled_linear' or 'linear'")
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"prediction_type={self.prediction_type!r}; expected 'epsilon', 'v_prediction' or 'sample'"
            )
        if self.timestep_spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(
                f"timestep_spacing={self.timestep_spacing!r}; expected 'leading', 'trailing' or 'linspace'"
            )
        if self.clip_sample:
            raise ValueError("clip_sample=True clips latents to [-1, 1]; Stable Diffusion's schedules have it False")


@dataclass(frozen=True)
class ModelConfig:
    """A whole Stable Diffusion: the configurations of its parts."""

    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


def _check_divisible(name: str, value: int, by_name: str, by: int) -> None:
    if by < 1 or value % by:
        raise ValueError(f"{name} has {value}, which {by_name}={by} does not divide; choose a multiple")


SD15 = ModelConfig()
SD15_INPAINT = ModelConfig(unet=UNetConfig(in_channels=9))

_SD2_TEXT = TextEncoderConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=23,
    num_attention_heads=16,
    hidden_act="gelu",
)
SD21_BASE = ModelConfig(
    text_encoder=_SD2_TEXT,
    unet=UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True),
)
SD21 = ModelConfig(
    text_encoder=_SD2_TEXT,
    autoencoder=AutoencoderConfig(sample_size=768),
    unet=UNetConfig(
        sample_size=96,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
        upcast_attention=True,
    ),
    schedule=ScheduleConfig(prediction_type="v_prediction"),
)

# Stable Diffusion's 32 groups hold 4 channels or more each, and so do these: a norm with one channel to a group would
# take away every channel's mean, and with it the colour of a plain background.
TINY = ModelConfig(
    text_encoder=TextEncoderConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4),
    autoencoder=AutoencoderConfig(
        block_out_channels=(16, 32, 64, 128), layers_per_block=1, norm_num_groups=4, sample_size=128
    ),
    unet=UNetConfig(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=(2, 4, 6),
        norm_num_groups=8,
    ),
    schedule=ScheduleConfig(prediction_type="v_prediction", timestep_spacing="trailing"),
)
