"""LoRA files in the layout of kohya's trainer, and their metadata."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from minisd.io.adapter_files import factors
from minisd.io.atomic import save_atomically
from minisd.lora import LoRA

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}


def kohya_weights(lora: LoRA) -> dict[str, Tensor]:
    """Return the tensors of a LoRA by kohya's names: lora_down, lora_up and alpha of each layer."""
    weights = {}
    for name, update in lora.items():
        part, _, layer = name.partition(".")
        key = f"{PREFIXES[part]}_{layer.replace('.', '_')}"
        a, b = factors(update)
        weights[f"{key}.lora_down.weight"], weights[f"{key}.lora_up.weight"] = a, b
        weights[f"{key}.alpha"] = torch.tensor(update.scale * len(a))
    return weights


def save_with_facts(weights: dict[str, Tensor], path: Path, facts: Mapping[str, object]) -> None:
    """Save tensors to a safetensors file with facts as metadata, turned into strings as kohya's trainer does.

    The same tensors and facts make the same bytes; safetensors itself writes metadata in random order.
    """
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in sorted(facts.items())}
    data = save(weights)
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": {"format": "pt", **texts}, **json.loads(data[8:begin])}).encode()
    header += b" " * (-len(header) % 8)
    content = len(header).to_bytes(8, "little") + header + data[begin:]
    save_atomically(lambda temporary: temporary.write_bytes(content), path)


def training_facts(task: Any) -> dict[str, object]:
    """Return what kohya's trainer records about a LoRA (ss_…), as far as the task knows it."""
    (_, first), *_ = task.model.items()
    rank, schedule, tuning = len(first.lora_A), task.sd.config.schedule, task.tuning
    second = task.sd.config.text_encoder.hidden_size == 1024
    words: Counter[str] = Counter()
    for example in task.data.pictures.examples:
        for word in example.text.split(","):
            words[word.strip()] += example.repeats
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(first.scale * rank),
        "ss_v2": second,
        "ss_base_model_version": "sd_v2" if second else "sd_v1",
        "ss_v_parameterization": schedule.prediction_type == "v_prediction",
        "ss_resolution": f"({task.side}, {task.side})",
        "ss_enable_bucket": tuning.buckets,
        "ss_num_train_images": sum(example.repeats for example in task.data.pictures.examples),
        "ss_num_reg_images": 0 if task.prior is None else len(task.prior.pictures.examples),
        "ss_prior_loss_weight": tuning.prior_weight,
        "ss_caption_dropout_rate": tuning.caption_dropout,
        "ss_min_snr_gamma": "None" if tuning.min_snr is None else tuning.min_snr,
        "ss_noise_offset": tuning.noise_offset,
        "ss_gradient_checkpointing": tuning.checkpointing,
        "ss_seed": task.seed,
        "ss_tag_frequency": {"pictures": dict(words)},
    }
