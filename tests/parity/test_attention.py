"""Attention layers and transformer blocks beside diffusers' own."""

import pytest
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention as DiffusersAttention
from models import TOLERANCE, difference, noise

from minisd.attention import Attention, TransformerBlock


@pytest.mark.parametrize("context_dim", [None, 20])
def test_layer(context_dim):
    ours = Attention(24, 3, context_dim).double().requires_grad_(False)
    theirs = DiffusersAttention(24, context_dim, heads=3, dim_head=8).double()
    theirs.load_state_dict(ours.state_dict())
    x, context = noise(2, 7, 24), None if context_dim is None else noise(2, 5, context_dim)
    assert difference(ours(x, context), theirs(x, context)) <= TOLERANCE


def test_block():
    ours = TransformerBlock(24, 3, 20).double().requires_grad_(False)
    theirs = BasicTransformerBlock(24, 3, 8, cross_attention_dim=20).double()
    theirs.load_state_dict(ours.state_dict())
    x, context = noise(2, 7, 24), noise(2, 5, 20)
    assert difference(ours(x, context), theirs(x, encoder_hidden_states=context)) <= TOLERANCE
