"""Gradient checkpointing, from outside: blocks forget their activations and compute them again on the way back.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from minisd.attention import SpatialTransformer
from minisd.blocks import ResBlock
from minisd.text_encoder import Layer

BLOCKS = (ResBlock, SpatialTransformer, Layer)


def checkpoint_blocks(model: nn.Module) -> int:
    """Checkpoint all residual blocks, transformers and text layers of a model, in place; return their number.

    Only what enters a block is kept for the way back. Without gradients nothing changes.
    """
    blocks = [module for module in model.modules() if isinstance(module, BLOCKS)]
    for block in blocks:
        block.forward = partial(_forward, block.forward)  # type: ignore[method-assign]
    return len(blocks)


def _forward(forward: Callable[..., Any], *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    # nothing in these blocks is random
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)
