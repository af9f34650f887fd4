"""The syntax of AUTOMATIC1111's web UI for prompts that change during a run.

    [fox:cat:0.5]   [cat:0.5]   [fox::0.5]   prompt editing: fox before, cat after half of the steps; one may be empty
    [fox|cat]                                alternation: fox, cat, fox, cat …, step by step
    a fox AND snow :1.2                      composition: predictions for several prompts, with weights
    <lora:style:0.8>                         a LoRA and its weight, or two: for the text encoder and for the UNet

Weights in brackets and BREAK are part of a single prompt; `prompts.py` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from minisd.features.adapters import Weight
from minisd.generate import Denoiser
from minisd.guidance import Guidance

TOKEN = re.compile(r"\\.|[()\[\]:|]|[^()\[\]:|\\]+|\\", re.DOTALL)
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)\s*")
AND = re.compile(r"\bAND\b")
PART_WEIGHT = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$")
TAG = re.compile(r"<(lora|lyco|hypernet):([^<>]*)>")

Node: TypeAlias = "str | Edit | Alternation"


@dataclass(frozen=True)
class Edit:
    """Text that changes once: `before` up to step `when`, `after` from then on."""

    before: list[Node]
    after: list[Node]
    when: str

    def at(self, step: int, steps: int) -> list[Node]:
        """Return the text at a step, counted from 1. A number with a point is a fraction of the steps."""
        last = int(float(self.when) * (steps if "." in self.when else 1))
        return self.before if step <= min(last, steps) else self.after


@dataclass(frozen=True)
class Alternation:
    """Text that changes with every step."""

    options: list[list[Node]]

    def at(self, step: int, steps: int) -> list[Node]:
        """Return the text at a step, counted from 1."""
        return self.options[(step - 1) % len(self.options)]


@dataclass
class _Bracket:
    """An open bracket: its content so far, split at colons and bars."""

    opening: str
    parts: list[list[Node]] = field(default_factory=lambda: [[]])
    separators: list[str] = field(default_factory=list)

    def split(self, separator: str) -> None:
        self.separators.append(separator)
        self.parts.append([])

    def literal(self) -> list[Node]:
        """Return the content with its opening bracket, as text."""
        rest = zip(self.separators, self.parts[1:], strict=True)
        return [self.opening, *self.parts[0], *(node for mark, part in rest for node in (mark, *part))]

    def close(self) -> list[Node]:
        """Return the content of square brackets: an edit, an alternation, or text with its brackets."""
        if "|" in self.separators:
            options = [self.parts[0]]
            for mark, part in zip(self.separators, self.parts[1:], strict=True):
                if mark == "|":
                    options.append(part)
                else:
                    options[-1] = [*options[-1], mark, *part]
            return [Alternation(options)]
        *texts, last = self.parts
        when = "".join(node if isinstance(node, str) else "?" for node in last)
        if len(texts) in (1, 2) and NUMBER.fullmatch(when):
            before, after = self.parts[:2] if len(texts) == 2 else ([], self.parts[0])
            return [Edit(before, after, when)]
        return [*self.literal(), "]"]


def _parse(prompt: str) -> list[Node]:
    stack = [_Bracket("")]

    def end_of(opening: str) -> list[Node]:
        """Close the innermost bracket of a kind; those that are still open inside it are text."""
        while stack[-1].opening != opening:
            stack[-2].parts[-1] += stack.pop().literal()
        bracket = stack.pop()
        return bracket.close() if opening == "[" else [*bracket.literal(), ")"]

    for token in TOKEN.findall(prompt):
        opening = {")": "(", "]": "["}.get(token)
        if token in ("(", "["):
            stack.append(_Bracket(token))
        elif token in (":", "|") and stack[-1].opening == "[":
            stack[-1].split(token)
        elif opening is not None and any(bracket.opening == opening for bracket in stack):
            nodes = end_of(opening)
            stack[-1].parts[-1] += nodes
        else:
            stack[-1].parts[-1].append(token)
    while len(stack) > 1:
        stack[-2].parts[-1] += stack.pop().literal()
    return stack[0].parts[0]


def _text(nodes: Sequence[Node], step: int, steps: int) -> str:
    return "".join(node if isinstance(node, str) else _text(node.at(step, steps), step, steps) for node in nodes)


def texts_by_step(prompt: str, steps: int) -> list[str]:
    """Return the text of a prompt at each of `steps` steps, with prompt editing and alternation resolved.

    In a prompt without either, the text is the prompt itself.
    """
    nodes = _parse(prompt) if "[" in prompt else [prompt]
    if all(isinstance(node, str) for node in nodes):
        return [prompt] * steps
    return [_text(nodes, step, steps) for step in range(1, steps + 1)]


def split_composition(prompt: str) -> list[tuple[str, float]]:
    """Split a prompt at AND into (prompt, weight) pairs. A prompt without AND has weight 1, and is left as it is."""
    parts = AND.split(prompt)
    if len(parts) == 1:
        return [(prompt, 1.0)]
    weights = [PART_WEIGHT.search(part) for part in parts]
    return [
        (part[: weight.start()].strip(), float(weight[1])) if weight else (part.strip(), 1.0)
        for part, weight in zip(parts, weights, strict=True)
    ]


def split_loras(prompt: str) -> tuple[str, dict[str, Weight]]:
    """Remove the tags of LoRAs from a prompt, and return their weights by name, 1 by default.

    Raises ValueError for a tag that is not supported: hypernetworks, other arguments, the same LoRA twice.
    """
    loras: dict[str, Weight] = {}
    for tag in TAG.finditer(prompt):
        kind, (name, *weights) = tag[1], [part.strip() for part in tag[2].split(":")]
        if kind == "hypernet" or not name or len(weights) > 2 or not all(map(NUMBER.fullmatch, weights)):
            raise ValueError(
                f"{tag[0]} in the prompt is not supported; expected a LoRA with its weight, <lora:name:0.8>, or with "
                "those for the text encoder and the UNet, <lora:name:0.5:0.8>"
            )
        if name in loras:
            raise ValueError(f"the prompt has {name!r} twice as a LoRA; add up its weights in one tag")
        first, *second = [*map(float, weights)] or [1.0]
        loras[name] = {"text_encoder": first, "unet": second[0]} if second else first
    return (TAG.sub("", prompt).strip() if loras else prompt), loras


def plain(prompt: str) -> str:
    """Return everything that a prompt draws at any step, as one text without tags, editing, alternation and AND."""

    def every(nodes: Sequence[Node]) -> str:
        texts = []
        for node in nodes:
            parts = [node.before, node.after] if isinstance(node, Edit) else getattr(node, "options", [])
            texts.append(node if isinstance(node, str) else " ".join(map(every, parts)))
        return "".join(texts)

    return " ".join(part for part, _ in split_composition(every(_parse(TAG.sub("", prompt)))))


def check_single(prompt: str) -> None:
    """Raise ValueError for a prompt that changes during a run or composes several, and so has no single encoding."""
    changes = any(not isinstance(node, str) for node in _parse(prompt))
    if changes or TAG.search(prompt) or len(split_composition(prompt)) > 1:
        raise ValueError(
            f"{prompt[:80]!r} has prompt editing, alternation, AND or a LoRA, so it has no single encoding"
        )


def switched(denoisers: Sequence[Denoiser]) -> Denoiser:
    """Return a denoiser that uses each of `denoisers` for one step of a run, in order."""

    def denoise(latents: Tensor, timestep: Tensor, progress: float) -> Tensor:
        # progress is that of calls; samplers with two calls per step make both with the same prompt
        return denoisers[int(progress * len(denoisers) + 1e-6)](latents, timestep, progress)

    return denoise if len(denoisers) > 1 else denoisers[0]


def composed(
    unet: Callable[..., Tensor], conds: Sequence[Tensor], weights: Tensor, uncond: Tensor, guidance: Guidance
) -> Denoiser:
    """Return a denoiser for prompts of several parts, composed as p = p_uncond + Σ wᵢ (pᵢ − p_uncond).

    Args:
        unet: The UNet, or a callable with the same signature.
        conds: The text embeddings (n, tokens, d) of each part.
        weights: The weights of the parts, (parts, n).
        uncond: The text embeddings (n, tokens, d) of the negative prompts.
        guidance: The guidance, applied to the composed prediction.

    Source: Liu et al. 2022, "Compositional Visual Generation with Composable Diffusion Models", equation 11.
    """

    def denoise(latents: Tensor, timestep: Tensor, progress: float) -> Tensor:
        latents = latents.to(uncond.dtype)
        base = unet(latents, timestep, uncond).float()
        total = base.clone()
        for cond, weight in zip(conds, weights, strict=True):
            total += weight.view(-1, 1, 1, 1) * (unet(latents, timestep, cond).float() - base)
        return guidance.combine(base, total) if guidance.is_active(progress) else total

    return denoise
