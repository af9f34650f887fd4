"""`StableDiffusion.compile`: one graph for the UNet and one for the decoder, without breaks, for all steps of a run.

The graphs are caught by torch's counter and run as they are, operator by operator; what the compiler for a device makes
of them takes minutes. So the pictures must be the same, bit for bit.
"""

from collections.abc import Iterator

import pytest
import torch._dynamo as dynamo
from forked import call, execute

from minisd import StableDiffusion


@pytest.fixture
def fresh() -> Iterator[None]:
    dynamo.reset()
    yield
    dynamo.reset()


# A model with one block of each kind, in a process in which no model has run: what libraries remember of their first
# call is watched by dynamo, and must not make another graph in the second.
STEPS = """
import copy
from dataclasses import replace
import numpy as np
import torch
from models import SMALL
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from minisd import Autoencoder, StableDiffusion, TextEncoder, Tokenizer, UNet, record_attention

down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
unet = replace(SMALL.unet, block_out_channels=(8, 8), down_block_types=down, up_block_types=up)
config = replace(SMALL, unet=unet, autoencoder=replace(SMALL.autoencoder, block_out_channels=(8, 8)))
torch.manual_seed(0)
parts = TextEncoder(config.text_encoder), UNet(config.unet), Autoencoder(config.autoencoder)
sd = StableDiffusion(config, Tokenizer.from_pretrained(), *parts)
plain, counter = copy.deepcopy(sd), CompileCounter()
sd.compile(backend=counter)
for seed in (7, 8):
    picture = sd("a fox in the snow", seed=seed, num_inference_steps=2)
    assert counter.frame_count == 2 and not counters["graph_break"], (seed, counter.frame_count, counters)
    expected = plain("a fox in the snow", seed=seed, num_inference_steps=2)
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))
    assert np.ptp(np.asarray(picture)) > 20
# other timesteps, words, samplers and scales are the same graphs
sd("two cats", seed=8, num_inference_steps=5, sampler="heun", guidance_scale=3.0, negative_prompt="a dog")
assert counter.frame_count == 2
# recorded attention is computed openly, by the plain code
with record_attention(sd.unet) as records:
    *_, last = sd.denoise("a fox in the snow", seed=7, num_inference_steps=2)
assert len(records) == 2 * 8 and counter.frame_count == 2
reached = [*plain.denoise("a fox in the snow", seed=7, num_inference_steps=2)][-1].latents
torch.testing.assert_close(last.latents, reached, rtol=0, atol=1e-4)
# and afterwards the graphs are used again
sd("a fox", seed=1, num_inference_steps=1)
assert counter.frame_count == 2
"""


def test_one_graph_each_and_no_other_from_step_to_step():
    done = call(execute, STEPS)
    assert done.code == 0, done.err[-3000:]


def test_a_graph_that_breaks_is_an_error(fresh):
    """So that the test above can fail: what cannot be traced within the UNet is refused."""
    sd = StableDiffusion.from_pretrained()
    sd.unet.register_forward_pre_hook(lambda module, inputs: print("a break"))
    sd.compile(backend="eager")
    with pytest.raises(dynamo.exc.Unsupported):
        sd("a fox", seed=0, num_inference_steps=1)
