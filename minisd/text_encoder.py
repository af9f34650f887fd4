"""The CLIP text encoder: maps token ids to text embeddings, one per token, for the UNet's cross-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.attention import attend
from minisd.config import TextEncoderConfig


def quick_gelu(x: Tensor) -> Tensor:
    """Apply the sigmoid approximation of GELU used by OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


class Embeddings(nn.Module):
    """Sum of learned token and position embeddings. ids (n, tokens) -> (n, tokens, width)."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention with a causal mask. (n, tokens, width) -> (n, tokens, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class MLP(nn.Module):
    """Two linear layers with a GELU activation in between. (n, tokens, width) -> (n, tokens, width)."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.activation = quick_gelu if config.hidden_act == "quick_gelu" else F.gelu
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    """Pre-norm transformer layer. (n, tokens, width) -> (n, tokens, width)."""

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
    """CLIP text encoder. Parameter names follow transformers' `CLIPTextModel` (`text_model.…`).

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
        """Transformer layers, in order."""
        return self.text_model["encoder"]["layers"]  # type: ignore[index, return-value]

    @property
    def token_embedding(self) -> nn.Embedding:
        """Token embedding table. In the bundled tiny model, a zero row marks a token that was never trained."""
        return self.text_model["embeddings"].token_embedding  # type: ignore[return-value]

    def forward(self, ids: Tensor, clip_skip: int = 1) -> Tensor:
        """Encode token ids.

        Args:
            ids: Token ids, (n, tokens), at most 77 tokens.
            clip_skip: Which layer's output to use, counted from the end: 1 is the last, 2 the penultimate.

        Returns:
            Text embeddings, (n, tokens, width), after the final LayerNorm.
        """
        x = self.text_model["embeddings"](ids)
        for layer in self.layers[: len(self.layers) + 1 - clip_skip]:
            x = layer(x)
        return self.text_model["final_layer_norm"](x)
