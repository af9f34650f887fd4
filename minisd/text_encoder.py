"""CLIP's text transformer: token ids to one vector per token, which the UNet's cross-attention reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.attention import attend
from minisd.config import TextEncoderConfig


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that OpenAI trained CLIP with."""
    return x * torch.sigmoid(1.702 * x)


class Embeddings(nn.Module):
    """A learned token vector plus a learned position vector. ids (n, tokens) -> (n, tokens, width)."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and the tokens before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class MLP(nn.Module):
    """Two linear layers with a GELU in between."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.activation = quick_gelu if config.hidden_act == "quick_gelu" else F.gelu
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """A pre-norm transformer layer. (n, tokens, width) -> (n, tokens, width)."""

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
    """The text half of CLIP. Parameters are named as in published `CLIPTextModel` checkpoints (`text_model.…`).

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
        """The table of token vectors. A row of zeros belongs to a token that was never trained."""
        return self.text_model["embeddings"].token_embedding  # type: ignore[return-value]

    def forward(self, ids: Tensor, clip_skip: int = 1) -> Tensor:
        """Encode token ids.

        Args:
            ids: (n, tokens), at most 77 tokens.
            clip_skip: 1 runs every layer, 2 stops one layer before the last, and so on.

        Returns:
            One vector per token, (n, tokens, width), after the final LayerNorm.
        """
        x = self.text_model["embeddings"](ids)
        for layer in self.layers[: len(self.layers) + 1 - clip_skip]:
            x = layer(x)
        return self.text_model["final_layer_norm"](x)
