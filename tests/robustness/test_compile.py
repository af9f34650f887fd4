"""`StableDiffusion.compile`: one graph for the UNet and one for the decoder, without breaks, for all steps of a run.

The graphs are caught by torch's counter and run as they are, operator by operator; what the compiler for a device makes
of them takes minutes. So the pictures must be the same, bit for bit.
"""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch._dynamo as dynamo
from torch._dynamo.testing import CompileCounter

from minisd import StableDiffusion, record_attention


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    dynamo.reset()
    yield
    dynamo.reset()


def test_one_graph_each_and_no_other_from_step_to_step():
    plain, sd, counter = StableDiffusion.from_pretrained(), StableDiffusion.from_pretrained(), CompileCounter()
    expected = plain("a fox in the snow", seed=7, num_inference_steps=2)
    dynamo.utils.counters.clear()
    sd.compile(backend=counter)
    picture = sd("a fox in the snow", seed=7, num_inference_steps=2)
    assert counter.frame_count == 2 and not dynamo.utils.counters["graph_break"]
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))
    # other timesteps, words, samplers and scales are the same graphs
    sd("two cats", seed=8, num_inference_steps=5, sampler="heun", guidance_scale=3.0, negative_prompt="a dog")
    assert counter.frame_count == 2
    # recorded attention is computed openly, by the plain code
    with record_attention(sd.unet) as records:
        *_, last = sd.denoise("a fox in the snow", seed=7, num_inference_steps=2)
    assert len(records) == 2 * 14 and counter.frame_count == 2
    reached = [*plain.denoise("a fox in the snow", seed=7, num_inference_steps=2)][-1].latents
    torch.testing.assert_close(last.latents, reached, rtol=0, atol=1e-4)
    # and afterwards the graphs are used again
    sd("a fox", seed=1, num_inference_steps=1)
    assert counter.frame_count == 2


FRESH = """
from torch._dynamo.testing import CompileCounter
from minisd import StableDiffusion
sd, counter = StableDiffusion.from_pretrained(), CompileCounter()
sd.compile(backend=counter)
for seed in (0, 1):
    sd("a fox", seed=seed, num_inference_steps=2, progress=False)
    print(counter.frame_count)
"""


def test_nothing_that_a_first_call_leaves_behind_makes_another_graph():
    """In a process in which no model has run: what libraries remember of their first call is watched by dynamo."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "2"]


def test_a_graph_that_breaks_is_an_error():
    """So that the test above can fail: what cannot be traced within the UNet is refused."""
    sd = StableDiffusion.from_pretrained()
    sd.unet.register_forward_pre_hook(lambda module, inputs: print("a break"))
    sd.compile(backend="eager")
    with pytest.raises(dynamo.exc.Unsupported):
        sd("a fox", seed=0, num_inference_steps=1)
