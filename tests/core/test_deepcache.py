"""DeepCache: what a call from the cached feature returns is computed with the plain network, by hooks that put the old
feature in the place of the new one."""

import pytest
import torch
from models import SMALL_UNET, SMALL_UNET_2, last, lively_model, noise, random_weights

from minisd import Sampler, StableDiffusion, UNet
from minisd.config import UNetConfig
from minisd.features.deepcache import DeepCache, count_up_layers
from minisd.io.configs import read_config


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return lively_model()


@pytest.fixture
def calls(sd):
    """The calls of the UNet: their rows, and whether they were full."""
    seen: list[tuple[int, str]] = []
    hooks = [
        sd.unet.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append((len(inputs[0]), "last"))),
        sd.unet.mid_block.register_forward_pre_hook(lambda *_: seen.append((seen.pop()[0], "full"))),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def drawn(sd, **settings) -> torch.Tensor:
    return last(sd.denoise("a fox in the snow", **{"seed": 3, "num_inference_steps": 6} | settings))


@pytest.mark.parametrize("values", [SMALL_UNET, SMALL_UNET_2], ids=["SD 1", "SD 2"])
@torch.no_grad()
def test_cached_call_equals_the_plain_network_with_the_old_feature(values):
    config = read_config(UNetConfig, values)
    unet = UNet(config).double()
    unet.load_state_dict(random_weights(unet, torch.float64))
    resnets = [resnet for block in unet.up_blocks for resnet in block.resnets]
    assert count_up_layers(unet) == len(resnets)
    first, second = (noise(2, 4, 8, 12, seed=seed) for seed in (1, 2))
    context, before, after = noise(2, 77, values["cross_attention_dim"], seed=3), torch.tensor(600), torch.tensor(555)
    for depth in range(1, len(resnets) + 1):
        cached, place, seen = DeepCache(unet, 2, depth), resnets[-depth], []
        hook = place.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))  # noqa: B023
        plain = unet(first, before, context)
        hook.remove()
        assert torch.equal(cached(first, before, context), plain)
        old = seen[0][:, : cached.feature.shape[1]]
        assert torch.equal(cached.feature, old)

        def put(module, inputs, old=old):
            return torch.cat([old, inputs[0][:, old.shape[1] :]], dim=1), *inputs[1:]

        hook = place.register_forward_pre_hook(put)
        expected = unet(second, after, context)
        hook.remove()
        found = cached(second, after, context)
        assert torch.equal(found, expected)
        assert not torch.allclose(found, unet(second, after, context))


@torch.no_grad()
def test_cached_call_runs_only_the_layers_it_needs(sd):
    """This UNet has two layers a level: with one, one map of the way down is needed, and no deeper block."""
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in sd.unet.named_modules()
        if name.endswith((".conv1", "proj_in", ".conv", "conv_in", "conv_out"))
    ]
    down, up = "down_blocks.0.{}s.0.{}", "up_blocks.2.{}s.0.{}"
    second = [way.format(*layer) for way in (down, up) for layer in (("resnet", "conv1"), ("attention", "proj_in"))]
    last_layer = ["up_blocks.2.resnets.1.conv1", "up_blocks.2.attentions.1.proj_in"]
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(300.0), torch.randn(1, 77, 16)
    for depth, expected in ((1, []), (2, second)):
        cached = DeepCache(sd.unet, 2, depth)
        cached(*inputs)
        ran.clear()
        cached(*inputs)
        assert ran == ["conv_in", *expected, *last_layer, "conv_out"]
    for hook in hooks:
        hook.remove()


def test_interval_of_full_calls(sd, calls):
    drawn(sd, feature_reuse=(3, 1), guidance_scale=1.0)
    assert [kind for _, kind in calls] == ["full", "last", "last"] * 2
    calls.clear()
    drawn(sd, feature_reuse=(2, 2))
    assert calls == [(2, "full"), (2, "last")] * 3
    calls.clear()
    # guidance begins at the third call, where no feature of the negative prompt is cached; at its end there is one
    drawn(sd, feature_reuse=(4, 1), guidance_interval=(0.3, 0.6))
    assert calls == [(1, "full"), (1, "last"), (2, "full"), (2, "last"), (1, "last"), (1, "last")]
    calls.clear()
    drawn(sd)
    drawn(sd, feature_reuse=(1, 1))
    assert calls == [(2, "full")] * 12


def test_prompts_half_of_the_feature_serves_after_guidance(sd):
    """The same walk by hand: full calls cache both features, and a call without guidance takes the second."""
    plan = Sampler("euler").plan(sd.schedule, 3)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"num_inference_steps": 3, "sampler": "euler", "guidance_scale": 3.0, "negative_prompt": "night"}
    found = drawn(sd, latents=latents, guidance_interval=(0.0, 0.5), feature_reuse=(3, 2), **settings)
    context = sd.encode_text(["night", "a fox in the snow"])
    state, cached = plan.start(latents), DeepCache(sd.unet, 3, 2)
    with torch.inference_mode():
        for index, t in enumerate(plan.timesteps):
            x = plan.latents(state)
            if index < 2:
                negative, positive = cached(torch.cat([x, x]), torch.tensor(t), context).chunk(2)
                prediction = negative + 3.0 * (positive - negative)
            else:
                one = DeepCache(sd.unet, 3, 2)
                one.feature = cached.feature[1:]
                prediction = one(x, torch.tensor(t), context[1:])
            state, _ = plan.step(state, prediction)
    assert torch.allclose(found, plan.latents(state), atol=1e-5)


def test_interval_of_one_changes_nothing(sd):
    assert torch.equal(drawn(sd, feature_reuse=(1, 3)), drawn(sd))
    assert not torch.allclose(drawn(sd, feature_reuse=(2, 1)), drawn(sd), atol=1e-3)


def test_interleaved_runs_have_caches_of_their_own(sd):
    settings = {"num_inference_steps": 6, "feature_reuse": (3, 1)}
    alone = [drawn(sd, seed=seed, **settings) for seed in (1, 2)]
    runs = [sd.denoise("a fox in the snow", seed=seed, **settings) for seed in (1, 2)]
    *_, (one, two) = zip(*runs, strict=True)
    assert torch.equal(one.latents, alone[0]) and torch.equal(two.latents, alone[1])


def test_preset_equals_its_settings(sd, calls):
    found = drawn(sd, num_inference_steps=None, preset="fast")
    assert calls == [(2, "full"), (2, "last")] * 6
    sampler = Sampler("dpmpp_2m", spacing="trailing")
    assert torch.equal(found, drawn(sd, num_inference_steps=12, sampler=sampler, feature_reuse=(2, 2)))


def test_settings_of_the_caller_beat_the_preset(sd, calls):
    own = {"num_inference_steps": 4, "guidance_interval": (0.0, 0.5), "feature_reuse": (4, 1), "sampler": "ddim"}
    found = drawn(sd, preset="fast", **own)
    assert calls == [(2, "full"), (2, "last"), (1, "last"), (1, "last")]
    assert torch.equal(found, drawn(sd, **own))


def test_depth_out_of_range(sd):
    with pytest.raises(ValueError, match="depth=7; expected 1 to 6"):
        DeepCache(sd.unet, 2, 7)
