"""FLOP by kind and by level, against a network small enough to count by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from minisd.autoencoder import Autoencoder
from minisd.bench.counting import Meter, _Traffic, by_kind, by_level, bytes_moved
from minisd.config import SD15, TINY
from minisd.unet import UNet


class Block(nn.Module):
    def __init__(self, down: bool):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.downsamplers = nn.ModuleList([nn.Conv2d(2, 2, 3, stride=2, padding=1)] if down else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for layer in self.downsamplers:
            x = layer(x)
        return x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([Block(down=True), Block(down=False)])
        self.mid_block = nn.Linear(4, 5)
        self.up_blocks = nn.ModuleList([Block(down=False)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.down_blocks:
            x = block(x)
        self.mid_block(x)
        return self.up_blocks[0](x)


@pytest.fixture
def counter():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Net()(torch.empty(1, 2, 8, 8))
    return counter


def test_resampling_counts_at_the_size_that_it_makes(counter):
    place = 2 * 2 * 2 * 9  # FLOP of a convolution for one place
    found = by_level(counter, {"down_blocks": (8, 4), "up_blocks": (4, 8)})
    assert found["8²"]["convolutions"] == 64 * place
    assert found["4²"]["convolutions"] == 3 * 16 * place
    assert found["middle"] == {"convolutions": 0, "linear layers": 2 * 8 * 4 * 5, "attention": 0}


def test_kinds_add_up_to_everything(counter):
    assert sum(by_kind(counter.get_flop_counts()["Global"]).values()) == counter.get_total_flops()


def test_an_operation_without_a_kind_is_refused():
    with pytest.raises(KeyError, match="baddbmm"):
        by_kind({torch.ops.aten.baddbmm: 1})


def test_bytes_are_those_that_operators_read_and_write():
    conv, x = nn.Conv2d(2, 3, 3, padding=1, bias=False), torch.empty(1, 2, 8, 8)
    with torch.no_grad(), _Traffic() as traffic:
        y = conv(x)  # 128 numbers, 54 weights, 192 answers
        y.view(3, 64).transpose(0, 1)  # views
        torch.relu_(y)  # reads and writes 192
    assert traffic.bytes == 4 * (128 + 54 + 192 + 2 * 192)


def test_a_step_reads_its_weights_at_least_once():
    moved = bytes_moved(SD15)
    assert moved["step"] > 4 * 859e6 and moved["decode"] > 4 * 49e6


def test_bytes_of_a_change_and_of_questions_for_the_device():
    changed: list[nn.Module] = []
    assert bytes_moved(TINY, changed.append) == bytes_moved(TINY)
    assert [type(network) for network in changed] == [UNet, Autoencoder]

    class Asks(nn.SiLU):
        def forward(self, x):
            assert x.device.type == "cpu"
            return super().forward(x)

    def ask(network):
        for module in network.modules():
            if type(module) is nn.SiLU:
                module.__class__ = Asks

    assert bytes_moved(TINY, ask) == bytes_moved(TINY)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_meter_counts_what_is_alive_at_the_same_time(device):
    with torch.device(device):
        before = torch.zeros(1000)
        with Meter() as meter:
            x = before + 1
            x = x * 2  # both are alive
            x = x + 3
            view = x[:10].view(2, 5)
            view.add_(1)
    assert (meter.peak, sum(meter.alive.values())) == (8000, 4000)
