"""CLIP's text transformer: token ids to one vector per token, which the UNet's cross-attention reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.attention import attend
from minisd.config import TextEncoderConfig

TABLE = "text_model.embeddings.token_embedding.weight"  # the rows of the tokens, in the state of a TextEncoder


def quick_gelu(x: Tensor) -> Tensor:
    """Return x · sigmoid(1.702 x), the approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


class Embeddings(nn.Module):
    """A learned vector for the token plus a learned vector for its position. ids (n, tokens) -> (n, tokens, width)."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and those before it. (n, tokens, width) -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attend(self, q, k, v, self.heads, causal=True))


class MLP(nn.Module):
    """Two linear layers with CLIP's activation in between. (n, tokens, width) -> the same."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.activation = quick_gelu if config.hidden_act == "quick_gelu" else F.gelu
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """A pre-norm transformer layer: attention, then MLP, each added to its input. (n, tokens, width) -> the same."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CausalSelfAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nn.Module):
    """The text half of CLIP, with the parameter names of transformers' `CLIPTextModel` as published (`text_model.…`).

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.4.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.text_model = nn.ModuleDict(
            {
                "embeddings": Embeddings(config),
                "encoder": nn.ModuleDict({"layers": layers}),
                "final_layer_norm": nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
            }
        )

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers, first to last."""
        return self.text_model["encoder"]["layers"]  # type: ignore[index, return-value]

    @property
    def token_embedding(self) -> nn.Embedding:
        """The table of token vectors; a row of zeros belongs to a token that was never trained."""
        return self.text_model["embeddings"].token_embedding  # type: ignore[return-value]

    def forward(self, ids: Tensor, clip_skip: int = 1) -> Tensor:
        """Token ids (n, tokens) to vectors (n, tokens, width): the last layer's output after the final LayerNorm.

        `clip_skip` counts as the community does: 1 uses every layer, 2 stops before the last one. Raises ValueError
        for more tokens than there are positions, or a clip_skip outside 1…layers.
        """
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{ids.shape[1]} tokens; the text encoder has {self.config.max_position_embeddings} positions"
            )
        if not 1 <= clip_skip <= len(self.layers):
            raise ValueError(f"clip_skip={clip_skip}; expected 1 (every layer) to {len(self.layers)}")
        x = self.text_model["embeddings"](ids)
        for layer in self.layers[: len(self.layers) + 1 - clip_skip]:
            x = layer(x)
        return self.text_model["final_layer_norm"](x)
