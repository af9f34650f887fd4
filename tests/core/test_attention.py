"""Attention against plain loops, and the maps recorded from outside while networks compute."""

import math
import threading

import pytest
import torch
from models import SMALL_AUTOENCODER, SMALL_TEXT, SMALL_UNET, noise, random_weights
from torch import Tensor, nn

import minisd.attention
from minisd import Autoencoder, TextEncoder, UNet, record_attention
from minisd.attention import GEGLU, Attention, attend
from minisd.config import AutoencoderConfig, TextEncoderConfig, UNetConfig
from minisd.features.attention_maps import attention_weights, watch_attention
from minisd.io.configs import read_config


def weights_in_loops(q: Tensor, k: Tensor, heads: int, causal: bool) -> Tensor:
    """softmax(q·k / √d), one number at a time."""
    n, queries, width = q.shape
    d, out = width // heads, torch.zeros(n, heads, queries, k.shape[1], dtype=q.dtype)
    for i in range(n):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            for a in range(queries):
                keys = range(a + 1 if causal else k.shape[1])
                exps = [math.exp(float(q[i, a, part] @ k[i, b, part]) / math.sqrt(d)) for b in keys]
                out[i, h, a, list(keys)] = torch.tensor(exps, dtype=q.dtype) / sum(exps)
    return out


@pytest.mark.parametrize(("keys", "causal"), [(5, False), (9, False), (5, True)])
def test_attend_and_weights_against_plain_loops(keys, causal):
    q, k, v = noise(2, 5, 12), noise(2, keys, 12, seed=2), noise(2, keys, 12, seed=3)
    weights = weights_in_loops(q, k, 3, causal)
    torch.testing.assert_close(attention_weights(q, k, 3, causal), weights, rtol=0, atol=1e-14)
    by_head = torch.stack([weights[:, h] @ v[..., 4 * h : 4 * h + 4] for h in range(3)], dim=2)
    torch.testing.assert_close(attend(q, k, v, 3, causal), by_head.flatten(2), rtol=0, atol=1e-14)


def test_weights_of_half_precision_are_float32():
    q, k = noise(1, 4, 8).half() * 300, noise(1, 4, 8, seed=2).half() * 300  # scores past float16's 65504
    weights = attention_weights(q, k, 1)
    assert weights.dtype == torch.float32
    expected = (q.double() @ k.double().mT / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(weights[0].double(), expected, rtol=1e-3, atol=1e-6)


def test_geglu_by_hand():
    layer = GEGLU(1, 1).double().requires_grad_(False)
    layer.load_state_dict({"proj.weight": torch.tensor([[2.0], [3.0]]), "proj.bias": torch.tensor([0.5, -1.0])})
    # a = 2·0.4 + 0.5, g = 3·0.4 − 1; gelu(g) = g Φ(g)
    a, g = 1.3, 0.2
    expected = a * g * 0.5 * (1 + math.erf(g / math.sqrt(2)))
    assert float(layer(torch.tensor([[0.4]], dtype=torch.float64))) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("upcast", [False, True])
def test_upcast_computes_half_precision_in_float32(dtype, upcast, monkeypatch):
    seen = []
    monkeypatch.setattr(minisd.attention, "attend", lambda q, *rest: seen.append(q.dtype) or attend(q, *rest))
    out = Attention(8, 2, upcast=upcast).to(dtype)(noise(1, 4, 8).to(dtype))
    assert out.dtype == dtype
    assert seen == [torch.float32 if upcast and dtype.itemsize == 2 else dtype]


def network(kind, config) -> nn.Module:
    built = kind(config).double().requires_grad_(False)
    built.load_state_dict(random_weights(built, torch.float64))
    return built


@torch.inference_mode()
def test_recording_a_unet():
    unet = network(UNet, read_config(UNetConfig, SMALL_UNET))
    inputs = noise(2, 4, 12, 8), torch.tensor(500), noise(2, 77, 24, seed=3)
    expected = unet(*inputs)
    with record_attention(unet) as records:
        found = unet(*inputs)
    assert torch.equal(found, expected) and torch.equal(unet(*inputs), expected)

    # 2 + 2 transformers on the way down, 1 in the middle, 3 + 3 on the way up; each looks at itself, then at the words
    places = [f"down_blocks.{level}.attentions.{i}" for level in (0, 1) for i in (0, 1)]
    places += ["mid_block.attentions.0"]
    places += [f"up_blocks.{level}.attentions.{i}" for level in (1, 2) for i in (0, 1, 2)]
    names = [f"{place}.transformer_blocks.0.{attn}" for place in places for attn in ("attn1", "attn2")]
    assert [record.name for record in records] == names
    pixels = [96] * 2 + [24] * 2 + [6] + [24] * 3 + [96] * 3
    assert [tuple(r.weights.shape) for r in records] == [(2, 4, p, keys) for p in pixels for keys in (p, 77)]
    for _, weights in records:
        assert weights.dtype == torch.float32 and not weights.requires_grad
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_recording_text_encoder_and_autoencoder():
    text = network(TextEncoder, read_config(TextEncoderConfig, SMALL_TEXT))
    autoencoder = network(Autoencoder, read_config(AutoencoderConfig, SMALL_AUTOENCODER))
    with record_attention(text) as records:
        text(torch.arange(77)[None])
    assert [record.name for record in records] == [f"text_model.encoder.layers.{i}.self_attn" for i in range(3)]
    for _, weights in records:
        assert weights.shape == (1, 4, 77, 77)
        assert torch.equal(weights, weights.tril())
    with record_attention(autoencoder) as records:
        autoencoder.decode(noise(1, 4, 5, 6))
    assert [(r.name, tuple(r.weights.shape)) for r in records] == [("decoder.mid_block.attentions.0", (1, 1, 30, 30))]


def test_recorded_weights_are_those_of_the_layer():
    layer, x, context = Attention(8, 2, context_dim=6), noise(2, 5, 8).float(), noise(2, 3, 6).float()
    seen: list[Tensor] = []
    with record_attention(layer) as records, watch_attention({layer: seen.append}):
        layer(x, context)
    expected = weights_in_loops(layer.to_q(x).double(), layer.to_k(context).double(), 2, False)
    torch.testing.assert_close(records[0].weights, expected.float(), rtol=1e-5, atol=1e-6)
    assert len(seen) == 1 and torch.equal(seen[0], records[0].weights)


def test_recording_is_of_one_model_and_one_thread_and_ends():
    layer, other, x = Attention(8, 2), Attention(8, 2), torch.ones(1, 3, 8)
    with pytest.raises(ZeroDivisionError), record_attention(layer) as records:
        other(x)
        thread = threading.Thread(target=layer, args=(x,))
        thread.start()
        thread.join()
        assert records == []
        layer(x)
        raise ZeroDivisionError
    layer(x)
    assert len(records) == 1


def test_recordings_nest():
    one, other, x = Attention(8, 2), Attention(8, 2), torch.ones(1, 3, 8)
    with record_attention(one) as outer:
        one(x)
        with record_attention(other) as inner:
            other(x)
            one(x)
        one(x)
    assert (len(outer), len(inner)) == (3, 1)
