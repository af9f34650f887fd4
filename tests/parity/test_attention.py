"""Attention against plain loops and diffusers' own layers; the recorder of its weights."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention as DiffusersAttention
from parity import (
    SMALL_AUTOENCODER,
    SMALL_TEXT,
    SMALL_UNET,
    TOLERANCE,
    autoencoders,
    difference,
    noise,
    text_encoders,
    unets,
)
from torch import Tensor, nn

import minisd.attention
from minisd.attention import (
    GEGLU,
    Attention,
    TransformerBlock,
    attend,
    attention_weights,
    record_attention,
    watch_attention,
)


def attend_in_loops(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> Tensor:
    """softmax(q·k / √d) weighted means, one number at a time."""
    n, queries, width = q.shape
    d, out = width // heads, torch.zeros_like(q)
    for i in range(n):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            for a in range(queries):
                keys = range(a + 1 if causal else k.shape[1])
                exps = [math.exp(float(q[i, a, part] @ k[i, b, part]) / math.sqrt(d)) for b in keys]
                for b in keys:
                    out[i, a, part] += exps[b] / sum(exps) * v[i, b, part]
    return out


@pytest.mark.parametrize("recorded", [False, True], ids=["fused", "explicit"])
@pytest.mark.parametrize(("keys", "causal"), [(5, False), (9, False), (5, True)])
def test_attend_against_plain_loops(keys: int, causal: bool, recorded: bool) -> None:
    layer = nn.Identity()
    q, k, v = noise(2, 5, 12), noise(2, keys, 12, seed=2), noise(2, keys, 12, seed=3)
    if recorded:
        with record_attention(layer):
            found = attend(layer, q, k, v, 3, causal)
    else:
        found = attend(layer, q, k, v, 3, causal)
    torch.testing.assert_close(found, attend_in_loops(q, k, v, 3, causal), rtol=0, atol=1e-14)


def test_training_in_mixed_precision_takes_the_plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which agree with the fused kernel to what bfloat16 holds, 8 bits, in values and gradients."""
    layer = nn.Identity()
    inputs = [noise(2, 5, 12, seed=seed).float().requires_grad_() for seed in (1, 2, 3)]
    fused = attend(layer, *inputs, 3)
    wanted = torch.autograd.grad(fused.square().sum(), inputs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    with torch.autocast("cpu", torch.bfloat16):
        plain = attend(layer, *inputs, 3)
    found = torch.autograd.grad(plain.float().square().sum(), inputs)
    torch.testing.assert_close(plain.float(), fused, rtol=0.02, atol=0.02)
    for mine, gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, gradient, rtol=0.05, atol=0.05)


def test_weights_of_half_precision_are_float32() -> None:
    q, k = noise(1, 2, 4, 8).half() * 30, noise(1, 2, 4, 8, seed=2).half() * 30  # scores past float16's 65504
    weights = attention_weights(q, k)
    assert weights.dtype == torch.float32
    expected = (q.double() @ k.double().mT / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("context_dim", [None, 20])
def test_layer_against_diffusers(context_dim: int | None) -> None:
    ours = Attention(24, 3, context_dim).double().requires_grad_(False)
    theirs = DiffusersAttention(24, context_dim, heads=3, dim_head=8).double()
    theirs.load_state_dict(ours.state_dict())
    x, context = noise(2, 7, 24), None if context_dim is None else noise(2, 5, context_dim)
    assert difference(ours(x, context), theirs(x, context)) <= TOLERANCE


def test_block_against_diffusers() -> None:
    ours = TransformerBlock(24, 3, 20).double().requires_grad_(False)
    theirs = BasicTransformerBlock(24, 3, 8, cross_attention_dim=20).double()
    theirs.load_state_dict(ours.state_dict())
    x, context = noise(2, 7, 24), noise(2, 5, 20)
    assert difference(ours(x, context), theirs(x, encoder_hidden_states=context)) <= TOLERANCE


def test_geglu_by_hand() -> None:
    layer = GEGLU(1, 1).double()
    layer.load_state_dict({"proj.weight": torch.tensor([[2.0], [3.0]]), "proj.bias": torch.tensor([0.5, -1.0])})
    # a = 2·0.4 + 0.5, g = 3·0.4 − 1; gelu(g) = g Φ(g)
    a, g = 1.3, 0.2
    expected = a * g * 0.5 * (1 + math.erf(g / math.sqrt(2)))
    assert float(layer(torch.tensor([[0.4]], dtype=torch.float64))) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("upcast", [False, True])
def test_upcast_computes_halves_in_float32(dtype: torch.dtype, upcast: bool, monkeypatch: Any) -> None:
    seen = []

    def spy(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        seen.extend([q.dtype, k.dtype, v.dtype])
        return attend(layer, q, k, v, heads)

    monkeypatch.setattr(minisd.attention, "attend", spy)
    out = Attention(8, 2, upcast=upcast).to(dtype)(noise(1, 4, 8).to(dtype))
    assert out.dtype == dtype
    assert seen == 3 * [torch.float32 if upcast and dtype.itemsize == 2 else dtype]


def run_unet(unet: Any) -> Tensor:
    with torch.inference_mode():
        return unet(noise(2, 4, 12, 8), torch.tensor(500), noise(2, 77, 24, seed=3))


def test_recording_a_unet() -> None:
    unet = unets(SMALL_UNET).ours
    expected = run_unet(unet)
    with record_attention(unet) as records:
        found = run_unet(unet)
    assert difference(found, expected) <= TOLERANCE
    assert torch.equal(run_unet(unet), expected)

    # 2 + 2 transformers on the way down, 1 in the middle, 3 + 3 on the way up; each looks at itself, then at the words
    places = [f"down_blocks.{level}.attentions.{i}" for level in (0, 1) for i in (0, 1)]
    places += ["mid_block.attentions.0"]
    places += [f"up_blocks.{level}.attentions.{i}" for level in (1, 2) for i in (0, 1, 2)]
    names = [f"{place}.transformer_blocks.0.{attn}" for place in places for attn in ("attn1", "attn2")]
    assert [record.name for record in records] == names
    pixels = [96] * 2 + [24] * 2 + [6] + [24] * 3 + [96] * 3
    shapes = [(2, 4, p, keys) for p in pixels for keys in (p, 77)]
    assert [tuple(record.weights.shape) for record in records] == shapes
    for record in records:
        assert record.weights.dtype == torch.float32
        assert not record.weights.requires_grad
        assert (record.weights >= 0).all()
        torch.testing.assert_close(record.weights.sum(-1), torch.ones(record.weights.shape[:-1]))


def test_recording_text_and_autoencoder() -> None:
    text, autoencoder = text_encoders(SMALL_TEXT).ours, autoencoders(SMALL_AUTOENCODER).ours
    with record_attention(text) as records:
        text(torch.arange(77)[None])
    assert [record.name for record in records] == [f"text_model.encoder.layers.{i}.self_attn" for i in range(3)]
    for record in records:
        assert record.weights.shape == (1, 4, 77, 77)
        assert torch.equal(record.weights, record.weights.tril())
    with record_attention(autoencoder) as records:
        autoencoder.decode(noise(1, 4, 5, 6))
    assert [(r.name, tuple(r.weights.shape)) for r in records] == [("decoder.mid_block.attentions.0", (1, 1, 30, 30))]


def test_only_the_given_model_is_recorded() -> None:
    one, other = Attention(8, 2), Attention(8, 2)
    with record_attention(one) as records:
        other(torch.ones(1, 3, 8))
        assert records == []
        one(torch.ones(1, 3, 8))
    assert len(records) == 1


def test_the_block_ends_with_an_error_too() -> None:
    layer = Attention(8, 2)
    with pytest.raises(ZeroDivisionError), record_attention(layer) as records:
        raise ZeroDivisionError
    layer(torch.ones(1, 3, 8))
    assert records == []


def test_blocks_nest() -> None:
    one, other = Attention(8, 2), Attention(8, 2)
    x = torch.ones(1, 3, 8)
    with record_attention(one) as outer:
        one(x)
        with record_attention(other) as inner:
            other(x)
            one(x)
        one(x)
    assert (len(outer), len(inner)) == (3, 1)


def test_another_thread_is_not_recorded() -> None:
    layer, x = Attention(8, 2), torch.ones(1, 3, 8)
    with record_attention(layer) as records:
        thread = threading.Thread(target=layer, args=(x,))
        thread.start()
        thread.join()
        assert records == []
        layer(x)
    assert len(records) == 1


def test_watching_hands_over_what_is_recorded_and_changes_no_bit() -> None:
    layer, other = Attention(8, 2, context_dim=6), Attention(8, 2)
    x, context = noise(2, 5, 8).float(), noise(2, 3, 6).float()
    with record_attention(layer) as records:
        layer(x, context)
    seen: list[torch.Tensor] = []
    with watch_attention({layer: seen.append}):
        watched = layer(x, context)
        other(x)
    assert torch.equal(watched, layer(x, context))
    assert len(seen) == 1 and torch.equal(seen[0], records[0].weights)


def test_another_thread_is_not_watched_and_the_block_ends() -> None:
    layer, x = Attention(8, 2), torch.ones(1, 3, 8)
    seen: list[torch.Tensor] = []
    with pytest.raises(ZeroDivisionError), watch_attention({layer: seen.append}):
        thread = threading.Thread(target=layer, args=(x,))
        thread.start()
        thread.join()
        raise ZeroDivisionError
    layer(x)
    assert seen == []
