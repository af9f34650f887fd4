"""The exercises' checks tell typical wrong answers what is wrong with them.

A wrong answer is a solution with a piece of its source replaced. That the solutions themselves pass is seen where nbval
runs their notebooks.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pytest
import torch

from minisd import StableDiffusion, figures
from minisd.lessons.exercises import check, expect
from minisd.training import scenes

FOLDER = Path(__file__).parents[1] / "notebooks" / "solutions"
SLOW = {
    ("00_tour", 3),
    ("10_pipeline", 1),
    ("11_editing", 4),
    ("14_speed", 1),
    ("14_speed", 3),
}  # they generate, or count
SLOW_NOTEBOOKS = {"01_latents", "06_schedule"}  # they encode many images first

# notebook, exercise, a piece of the solution, what takes its place, and words of the message
SLIPS = [
    (
        "00_tour",
        1,
        "height // factor, width // factor",
        "width // factor, height // factor",
        "the height comes before the width",
    ),
    (
        "00_tour",
        1,
        "return (1, sd.autoencoder.config.latent_channels, ",
        "return (sd.autoencoder.config.latent_channels, ",
        "the first is the batch",
    ),
    (
        "00_tour",
        1,
        "return (1, sd.autoencoder.config.latent_channels, height // factor, width // factor)",
        "return sd.encode_image(torch.zeros(1, 3, height, width))",
        "a tensor of shape",
    ),
    ("00_tour", 2, "x_t * (sigma**2 + 1) ** 0.5", "x_t", "first undo the scale"),
    ("00_tour", 2, "- sigma * epsilon", "+ sigma * epsilon", "taken away, not added"),
    ("00_tour", 3, "(1 - share) * a + share * b", "share * a + (1 - share) * b", "share 0 is the first prompt"),
    ("01_latents", 1, "2 * 10", "10", "twice as wide"),
    ("01_latents", 1, "-db / 20", "-db / 10", "for a standard deviation"),
    ("01_latents", 1, "-db / 20", "db / 20", "look at the sign"),
    ("02_autoencoder", 1, "shortcut = a * b + b if a != b else 0", "shortcut = 0", "if the width changes"),
    ("02_autoencoder", 1, "shortcut = a * b + b if a != b else 0", "shortcut = a * b + b", "if the width stays"),
    ("02_autoencoder", 1, "2 * a + 2 * b", "4 * a", "second norm comes after"),
    ("02_autoencoder", 2, "return 0.5 * ", "return ", "that is 2 times"),
    ("02_autoencoder", 2, "def kl_between(q, p):", "def kl_between(p, q):", "changed places"),
    ("02_autoencoder", 2, ".flatten(1).sum(1)", ".sum()", "one number for each picture"),
    ("02_autoencoder", 3, "apart *= stride", "pass", "later layers apart"),
    ("02_autoencoder", 3, "size, apart = 1, 1", "size, apart = 0, 1", "begin with the place itself"),
    ("02_autoencoder", 3, "size += (kernel - 1) * apart", "size += (kernel - 1) * apart * stride", "layers after it"),
    ("02_autoencoder", 4, "2 * math.log(factor)", "math.log(factor)", "logarithm of σ²"),
    ("02_autoencoder", 4, "changed.quant_conv.bias[:half] *= factor", "pass", "weights *and* biases"),
    ("02_autoencoder", 4, "changed = copy.deepcopy(autoencoder)", "changed = autoencoder", "change a copy"),
    ("03_tokenizer", 1, ".strip()", "", "no space at the very end"),
    ("03_tokenizer", 1, 'return text.replace("</w>", " ").strip()', "return text", "marks where a word ends"),
    (
        "03_tokenizer",
        1,
        'text = bytes(byte_symbols().index(symbol) for symbol in symbols).decode("utf-8", errors="replace")',
        "text = symbols",
        "symbols stand for bytes",
    ),
    (
        "03_tokenizer",
        1,
        'text = bytes(byte_symbols().index(symbol) for symbol in symbols).decode("utf-8", errors="replace")',
        'text = "".join(bytes(byte_symbols().index(s) for s in tokens[i]).decode("utf-8") for i in ids)',
        "put all bytes together",
    ),
    ("03_tokenizer", 2, "[END] * (76 - len(part))", "[END]", "every row has 77 ids"),
    ("03_tokenizer", 2, "> 75:", "> 60:", "as full as can be"),
    ("03_tokenizer", 2, "for part in parts]", "for part in parts if part]", "an empty text gives one row"),
    ("03_tokenizer", 2, "[END] * (76 - len(part))", "[END] + [0] * (75 - len(part))", "padding is END"),
    ("03_tokenizer", 2, 'if tokens[i].endswith("</w>"):', "if True:", "move whole words"),
    ("03_tokenizer", 3, "return best[-1]", "return tokenizer.tokenize(word)", "what merging gives"),
    ("03_tokenizer", 3, '"</w>" if end == len(word) else ""', '""', "the last token carries"),
    ("04_text_encoder", 1, "F.normalize(vectors.mean(dim=0), dim=0)", "vectors.mean(dim=0)", "length 1 again"),
    ("04_text_encoder", 1, "argmax(dim=1)", "argmax(dim=0)", "one class for each picture"),
    ("04_text_encoder", 2, "return s * on_scores", "return on_scores", "times what is expected"),
    (
        "04_text_encoder",
        2,
        "z.softmax(dim=1) + z.softmax(dim=0) - 2 * torch.eye(n)) / (2 * n)",
        "z.softmax(dim=1) - torch.eye(n)) / n",
        "columns is missing",
    ),
    ("04_text_encoder", 2, "on_scores.T @ pictures", "on_scores @ texts", "pull on the pictures"),
    (
        "04_text_encoder",
        3,
        "position_embedding.weight[position]",
        "position_embedding.weight[0]",
        "vector of its own position",
    ),
    ("04_text_encoder", 3, 'te.text_model["final_layer_norm"](x)', "x", "norm at the very end"),
    (
        "05_attention",
        1,
        "scores.masked_fill(~keep[:, None, None], -torch.inf).softmax(dim=-1)",
        "scores.softmax(-1) * keep[:, None, None]",
        "hide before the softmax",
    ),
    ("05_attention", 1, "~keep[:, None, None]", "keep[:, None, None]", "hide the padding, not the words"),
    ("05_attention", 1, "keep[:, None, None]", "keep", "yours went to queries"),
    ("05_attention", 1, "<", "<=", "has the keys 0 to 3"),
    ("05_attention", 1, "-torch.inf", "-60", "nearly 0 is not 0"),
    ("05_attention", 2, "torch.tensor(float(factor)).log()", "factor", "e to the power of what"),
    (
        "05_attention",
        2,
        "return F.scaled_dot_product_attention(q, k, v, attn_mask=added)",
        "k = k.clone(); k[:, :, place] *= factor; return F.scaled_dot_product_attention(q, k, v)",
        "not the score s",
    ),
    (
        "05_attention",
        2,
        "return F.scaled_dot_product_attention(q, k, v, attn_mask=added)",
        "w = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1); w[..., place] *= factor; return w @ v",
        "before the row is divided",
    ),
    ("05_attention", 3, " / q.shape[-1] ** 0.5", "", "divided by √d"),
    ("05_attention", 3, "shrink * mixed + exps @ v", "exps @ v", "expected"),
    ("05_attention", 3, "torch.maximum(top, scores.amax(dim=1, keepdim=True))", "torch.zeros_like(top)", "NaN"),
    (
        "06_schedule",
        1,
        "schedule.alphas_cumprod[t] / schedule.alphas_cumprod[s]",
        "schedule.alphas_cumprod[t]",
        "from clean",
    ),
    ("06_schedule", 1, "return math.sqrt(left), math", "return left, math", "root missing"),
    ("06_schedule", 1, "math.sqrt(1 - left)", "1 - left", "a root is missing"),
    ("06_schedule", 2, "sigma_at(t) / k", "sigma_at(t) * k", "more signal means"),
    ("06_schedule", 2, "return schedule.timestep_at(schedule.sigma_at(t) / k)", "return t", "the ratio at t itself"),
    ("06_schedule", 3, "np.sqrt(alphas_cumprod)", "alphas_cumprod", "and then squared"),
    ("06_schedule", 3, ") ** 2", ")", "square at the end"),
    ("06_schedule", 3, "return (shifted * root[0] / shifted[0]) ** 2", "return shifted**2", "stretch it"),
    ("06_schedule", 4, ".square().sum(2)", ".square().mean(2)", "nearly equal"),
    ("06_schedule", 4, "math.sqrt(level) * data", "data", "√ᾱ plus noise"),
    ("06_schedule", 4, "dim=1", "dim=0", "over the pictures"),
    ("07_unet", 1, "(height + 1) // 2, (width + 1) // 2", "height // 2, width // 2", "rounded up"),
    ("07_unet", 1, "shapes.append((channels, height, width))", "pass", "each halving"),
    (
        "07_unet",
        1,
        "shapes.append((channels, height, width))",
        "shapes.append((config.block_out_channels[level + 1], height, width))",
        "the width of its own level",
    ),
    ("07_unet", 2, "(1 + scale)", "scale", "multiply by 1 + scale"),
    ("07_unet", 2, "scale, shift = ", "shift, scale = ", "scales come first"),
    ("07_unet", 2, "F.silu(h * (1 + scale) + shift)", "F.silu(h) * (1 + scale) + shift", "norm2 first"),
    ("07_unet", 3, "F.silu(unet.conv_norm_out(x))", "unet.conv_norm_out(x)", "norm, SiLU, convolution"),
    ("07_unet", 3, "time = ", "unet(latents, t, context); time = ", "deep"),
    ("07_unet", 3, "[1][:-1]]", "[1]]", "not yet"),
    ("08_samplers", 1, "larger - sigma", "sigma - larger", "levels rise now"),
    ("08_samplers", 1, "    return x", "        return x", "where the walk began"),
    (
        "08_samplers",
        2,
        "return x + (smaller - sigma) * predict(half, middle)",
        "return half + (smaller - middle) * predict(half, middle)",
        "order 1",
    ),
    ("08_samplers", 2, "predict(half, middle)", "predict(x, sigma) if False else 0 * x", "one call"),
    ("08_samplers", 2, "    middle = (sigma + smaller) / 2", "    middle = smaller", "where Heun looks"),
    ("08_samplers", 3, "(epsilon - before) / (2 * r)", "(epsilon - before) / 2", "weights for even steps"),
    ("08_samplers", 3, " / (2 * r)", " * r / 2", "the other way up"),
    ("08_samplers", 3, " / (2 * r)", " / r", "not its end"),
    ("09_guidance", 1, "- s * sigma", "+ s * sigma", "wrong sign"),
    ("09_guidance", 1, "s * sigma *", "s *", "counts σ times"),
    ("09_guidance", 1, ".log_softmax(1)", "", "a logit is not a log-probability"),
    ("09_guidance", 1, ".log_softmax(1)", ".softmax(1)", "probability's logarithm"),
    ("09_guidance", 1, "[:, word]", "[:, 1 - word]", "the other word"),
    ("09_guidance", 2, "return s - 1", "return s", "some of `empty` is left"),
    ("09_guidance", 2, "- a * (avoid - empty)", "+ a * (avoid - empty)", "look at the sign"),
    ("09_guidance", 3, "end / run", "(end - 1) / run", "exclusive"),
    ("09_guidance", 3, "end / run", "(end + 1) / run", "one too many at the end"),
    ("09_guidance", 3, "begin / run.num_calls, end", "(begin - 1) / run.num_calls, end", "inclusive"),
    ("10_pipeline", 2, "2 * 2 * 8", "2 * 8", "two tables"),
    ("10_pipeline", 2, "(side // 8) ** 4", "64**2 * (side // 8) ** 2", "fourth"),
    ("10_pipeline", 2, "weights if offload else sum(WEIGHTS.values())", "weights", "all three parts"),
    ("10_pipeline", 2, "weights if offload else sum", "sum", "only the part at work"),
    ("10_pipeline", 2, "key=held.get", "key=ALIVE.get", "compare weights and activations together"),
    ("10_pipeline", 2, "(side / 512) ** 2", "1", "grow with the number of pixels"),
    ("10_pipeline", 2, "(side / 512) ** 2", "(side / 512)", "four times the pixels"),
    ("10_pipeline", 3, "bare(wanted[name]) != bare(found[name])", "wanted[name] != found[name]", "may stand for"),
    (
        "10_pipeline",
        3,
        "sorted(found.keys() - wanted.keys())",
        "sorted(found.keys() - wanted.keys())[::-1]",
        "sort the names",
    ),
    (
        "10_pipeline",
        3,
        "return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape",
        "return [side for side in shape if side != 1]",
        "(1, 1, 1) is not (1,)",
    ),
    (
        "10_pipeline",
        1,
        '[""] * len(prompts) + list(prompts)',
        'list(prompts) + [""] * len(prompts)',
        "halves of the batch",
    ),
    (
        "10_pipeline",
        1,
        "torch.stack(noises)",
        "torch.randn(len(seeds), 4, side, side, generator=torch.Generator().manual_seed(seeds[0]))",
        "a generator of its own",
    ),
    ("10_pipeline", 1, "manual_seed(seed)", "manual_seed(seeds[0])", "a seed of its own"),
    ("10_pipeline", 1, '[""] * len(prompts) + list(prompts)', '["", prompts[0], "", prompts[1]]', "first all negative"),
    ("10_pipeline", 1, "torch.cat([x, x])", "x.repeat_interleave(2, 0)", "another order than the contexts"),
    ("10_pipeline", 1, "for t in (*times, 0)]", "for t in times] + [1.0]", "timestep 0, not 1"),
    ("10_pipeline", 1, "x, a, a_next, scale)", "x, a, a_next, 2 * scale)", "compare with `by_hand`"),
    ("11_editing", 1, ">= steps - call", "> steps - call", "one call too late"),
    ("11_editing", 1, ">= steps - call", "< steps - call", "changed places"),
    ("11_editing", 1, "(steps * strengths).floor() >= steps - call", "steps * strengths > call", "not the first"),
    ("11_editing", 2, "math.sqrt(1 - like**2)", "(1 - like)", "lerp"),
    ("11_editing", 2, "math.sqrt(1 - like**2)", "(1 - like**2)", "variances add up"),
    (
        "11_editing",
        2,
        "like * noise + math.sqrt(1 - like**2) * fresh",
        "like**0.5 * noise + math.sqrt(1 - like) * fresh",
        "not its square",
    ),
    ("11_editing", 3, "math.sqrt(high**2 - low**2)", "(high - low)", "not levels"),
    ("11_editing", 3, "math.sqrt(high**2 - low**2)", "high", "already"),
    ("11_editing", 4, "up(x, sigma)", "up(x, larger)", "up asks at the lower level"),
    ("11_editing", 4, "down(x, sigma)", "down(x, smaller)", "down asks at the upper level"),
    ("11_editing", 4, "down(x, sigma)", "up(x, sigma)", "a prediction of its own"),
    ("12_training", 1, "[decay**n]", "[(1 - decay) * decay**n]", "in full"),
    ("12_training", 1, "torch.arange(n - 1, -1, -1)", "torch.arange(n)", "expected"),
    (
        "12_training",
        1,
        "return torch.cat([torch.tensor([decay**n]).double(), (1 - decay) * decay**ages])",
        "return [decay**n, *((1 - decay) * decay**ages).tolist()]",
        "makes a tensor",
    ),
    ("12_training", 2, ") / 2 > half", ") > half", "twice `half`"),
    ("12_training", 2, "    return n", "    return n - 2", "round up"),
    ("12_training", 3, "empty, contexts)", "contexts, empty)", "must go"),
    (
        "12_training",
        3,
        "context = torch.where(dropped[:, None, None], empty, contexts)",
        "context = contexts",
        "no caption was dropped",
    ),
    ("13_adapting", 2, " / len(A)", "", "divide by the rank"),
    ("13_adapting", 2, "return W + ", "W += weight * alpha / len(A) * delta; return W + 0 * ", "caller's tensor"),
    ("13_adapting", 3, "root[:, None] * V[:rank], U[:, :rank] * root", "V[:rank], U[:, :rank]", "are missing"),
    ("13_adapting", 3, "after - before", "before - after", "after − before"),
    (
        "13_adapting",
        3,
        "root[:, None] * V[:rank], U[:, :rank] * root",
        "U[:, :rank] * root, root[:, None] * V[:rank]",
        "A reads, B writes",
    ),
    ("13_adapting", 1, "torch.cat([A1, A2])", "torch.cat([w1 * A1, w2 * A2])", "in both it is squared"),
    ("13_adapting", 1, "w1 * B1, w2 * B2", "B1, B2", "weights are missing"),
    ("13_adapting", 4, "weight * error[mine:].mean()", "error[mine:].mean()", "without the weight"),
    ("13_adapting", 4, "error[:mine].mean() + weight * ", "weight * error[:mine].mean() + ", "the second group"),
    ("13_adapting", 4, ".mean()", ".sum()", "not a sum"),
    ("14_speed", 1, " + to_k_and_v", "", "expected"),
    ("14_speed", 1, "return to_q_and_out + to_k_and_v + scores_and_mix", "return scores_and_mix", "four linear layers"),
    (
        "14_speed",
        1,
        "return to_q_and_out + to_k_and_v + scores_and_mix",
        "return (to_q_and_out + to_k_and_v + scores_and_mix) // 2",
        "two FLOP",
    ),
    ("14_speed", 2, "n c (h a) (w b)", "n c (h b) (w a)", "changed places"),
    ("14_speed", 2, "F.conv2d(window, small, bias)", "F.conv2d(window, small)", "bias is missing"),
    (
        "14_speed",
        2,
        "    (h, w), padded",
        "    return F.conv2d(F.interpolate(x, scale_factor=3.0), weight, bias, padding=1)\n    (h, w), padded",
        "none of the nine",
    ),
    ("14_speed", 3, "kept_rows < rows or ", "age == 0 or ", "too few for a guided call"),
]

# blank lines in the lessons: notebook, what a learner writes, and words of the message ("yes" for the right line)
OF_12 = "a, b = (part.sqrt()[:, None, None, None] for part in (alphas_bar[t], 1 - alphas_bar[t])); "
BLANK_SLIPS = [
    ("06_schedule", "return c * x - s * v", "yes"),
    ("06_schedule", "return (c * x - s * v) / (c**2 + s**2)", "yes"),
    ("06_schedule", "return s * x + c * v", "that is ε"),
    ("06_schedule", "return c * x + s * v", "turn back"),
    ("06_schedule", "return (x - s * v) / c", "if v were the noise"),
    ("06_schedule", "return x / c", "still in it"),
    ("11_editing", "skipped = N - int(N * strength); return skipped, clean + plan.sigmas[skipped] * noise", "yes"),
    ("11_editing", "skipped = int(N * strength); return skipped, clean + plan.sigmas[skipped] * noise", "how many run"),
    ("11_editing", "skipped = int(N * (1 - strength)); return skipped, clean", "the calls that run are rounded down"),
    ("11_editing", "skipped = N - int(N * strength); return skipped, clean", "clean has no noise"),
    ("11_editing", "skipped = N - int(N * strength); return skipped, clean + noise", "that level has, not 1"),
    (
        "11_editing",
        "skipped = N - int(N * strength); return skipped, clean + plan.sigmas[skipped + 1] * noise",
        "sets out from, not the one it reaches",
    ),
    (
        "11_editing",
        "skipped = N - int(N * strength); return skipped, clean + plan.sigmas[N - skipped] * noise",
        "counts the calls from the top",
    ),
    (
        "11_editing",
        "skipped = N - int(N * strength); level = plan.sigmas[skipped]; "
        "return skipped, (clean + level * noise) / (level**2 + 1) ** 0.5",
        "nothing is divided",
    ),
    ("11_editing", "return small * x + (1 - small) * (clean + plan.sigmas[call + 1] * noise)", "yes"),
    ("11_editing", "return (1 - small) * x + small * (clean + plan.sigmas[call + 1] * noise)", "the other way round"),
    ("11_editing", "return small * x + (1 - small) * clean", "clean has no noise"),
    ("11_editing", "return small * x + (1 - small) * (clean + plan.sigmas[call] * noise)", "not the one it left"),
    ("11_editing", "return small * x + (1 - small) * (clean + noise)", "the level reached has, not 1"),
    ("11_editing", "return small * x + (1 - small) * clean + plan.sigmas[call + 1] * noise", "mind the brackets"),
    ("11_editing", "return clean + plan.sigmas[call + 1] * noise", "x is missing"),
    ("12_training", OF_12 + "return a * x0 + b * noise, a * noise - b * x0 if predicts_v else noise", "yes"),
    ("12_training", OF_12 + "x = a * x0 + b * noise; return x, (a * x - x0) / b if predicts_v else noise", "yes"),
    (
        "12_training",
        "a, b = alphas_bar[t] ** 0.5, (1 - alphas_bar[t]) ** 0.5; return a * x0 + b * noise, noise",
        "the width",
    ),
    ("12_training", OF_12 + "return a**2 * x0 + b**2 * noise, noise", "shares of the variance"),
    ("12_training", OF_12 + "return b * x0 + a * noise, noise", "belongs to the picture"),
    ("12_training", OF_12 + "return a * x0 + noise, noise", "has a factor, too"),
    ("12_training", OF_12 + "return a * x0 + b * noise, noise", "the answer is v"),
    ("12_training", OF_12 + "return a * x0 + b * noise, a * noise - b * x0", "this UNet predicts ε"),
    ("12_training", OF_12 + "return a * x0 + b * noise, b * x0 - a * noise", "the sign is reversed"),
    ("12_training", OF_12 + "x = a * x0 + b * noise; return x, a * noise - b * x", "not x_t"),
    ("12_training", OF_12 + "return a * x0 + b * noise", "expected"),
    ("14_speed", "return 2 * n * c_in * c_out * k * k * h * w", "yes"),
    ("14_speed", "return n * c_in * c_out * k * k * h * w", "are two FLOP"),
    ("14_speed", "return 2 * n * c_in * c_out * k * h * w", "k squared"),
    ("14_speed", "return 2 * n * c_in * c_out * k * k", "of the output's places"),
    ("14_speed", "return 2 * c_in * c_out * k * k * h * w", "for each picture"),
    ("14_speed", "return 2 * n * c_in * c_out * 9 * h * w", "k is not always 3"),
    ("14_speed", "2 * n * c_in * c_out * k * k * h * w", "return its answer"),
]


@pytest.fixture(scope="module")
def prepared() -> Iterator[Callable[[str], tuple[dict, bool]]]:
    """What the cells in front of a notebook's first exercise define, run once, and whether they left gradients on.

    Here the model draws 64×64 pixels in 4 steps, and four scenes of that size stand for all: no message depends on what
    is in a picture.
    """
    sd, few, whole = figures.load_model(), [scenes.scene(1, i) for i in range(4)], scenes.render
    sd.unet.config = replace(sd.unet.config, sample_size=8)
    config, defaults = replace(sd.config, unet=sd.unet.config), replace(sd.defaults, num_inference_steps=4)

    def smaller() -> StableDiffusion:
        parts = (copy.deepcopy(part) for part in (sd.text_encoder, sd.unet, sd.autoencoder))
        return StableDiffusion(config, sd.tokenizer, *parts, defaults)

    @cache
    def render(scene: scenes.Scene) -> np.ndarray:
        return whole(scene)[::3, ::3] if scene in few else whole(scene)

    namespaces: dict[str, tuple[dict, bool]] = {}

    def prepare(name: str) -> tuple[dict, bool]:
        if name not in namespaces:
            namespace: dict = {}
            with torch.enable_grad():
                run(parts(name)[0], namespace)
                namespaces[name] = namespace, torch.is_grad_enabled()
        namespace, gradients = namespaces[name]
        return dict(namespace), gradients

    state = np.random.get_state()
    with torch.random.fork_rng(), matplotlib.rc_context(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "load_model", smaller)
        patch.setattr(scenes, "scene", lambda seed, index: few[index % 4])
        patch.setattr(scenes, "render", render)
        yield prepare
    np.random.set_state(state)


@cache
def parts(name: str) -> list[list[str]]:
    """The code before the first exercise; then, for each exercise, its cells up to the check, which is the last one."""
    found: list[list[str]] = [[]]
    for cell in nbformat.read(FOLDER / f"{name}_solutions.ipynb", 4).cells:
        if cell.cell_type == "markdown" and re.search(rf"^\*\*{len(found)}\. ", cell.source, re.MULTILINE):
            found.append([])
        elif cell.cell_type == "code" and not (found[-1] and "\ncheck(" in found[-1][-1]):
            found[-1].append(cell.source)
    return found


@cache
def lesson(name: str) -> list[str]:
    """The code of a lesson's cells."""
    return [cell.source for cell in nbformat.read(FOLDER.parent / f"{name}.ipynb", 4).cells if cell.cell_type == "code"]


@cache
def begun(name: str) -> dict:
    """What a lesson's first cell of code defines."""
    namespace: dict = {}
    run(lesson(name)[:1], namespace)
    return namespace


def run(sources: list[str], namespace: dict) -> None:
    for source in sources:
        exec(compile(source, "<cell>", "exec"), namespace)


def slow(name: str, exercise: int) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if (name, exercise) in SLOW or name in SLOW_NOTEBOOKS else []


@pytest.mark.parametrize(
    ("name", "exercise", "old", "new", "words"),
    [pytest.param(*row, marks=slow(*row[:2]), id=f"{row[0]}-{row[1]}-{row[4]}") for row in SLIPS],
)
def test_slip_is_named(name, exercise, old, new, words, prepared, capsys):
    (namespace, gradients), (*answer, question) = prepared(name), parts(name)[exercise]
    assert any(old in source for source in answer)
    with torch.set_grad_enabled(gradients):
        run(answer, namespace)
        run([source.replace(old, new) for source in answer if old in source and "expect(" not in source], namespace)
        capsys.readouterr()
        run([question], namespace)
    said = capsys.readouterr().out
    assert said.startswith("not yet: ") and words in said, said


def assert_said(words: str, blank: str, line: str, namespace: dict, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the cell of a blank with a line in its place; its check has to say `words`."""
    run([re.sub(r"raise NotImplementedError  # your line.*", line, blank)], namespace)
    said = capsys.readouterr().out
    assert said.endswith("yes\n") if words == "yes" else "not yet: " in said and words in said, said


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [pytest.param(*row, marks=slow(row[0], 0), id=f"{row[0]}-{row[2]}") for row in BLANK_SLIPS],
)
def test_slip_in_a_blank_line_is_named(name, line, words, capsys):
    """The cell of the blank needs the lesson's first cell of code, and no other."""
    _, *others = lesson(name)
    of_enter = "skipped" in line  # notebook 11 has two blanks
    blank = next(source for source in others if "# your line" in source and ("def enter" in source) == of_enter)
    with torch.enable_grad(), matplotlib.rc_context():
        assert_said(words, blank, line, dict(begun(name)), capsys)


@pytest.mark.parametrize(
    ("begins", "line", "words"),
    [
        ("def fresh_part", "return math.sqrt(smaller**2 - (smaller**2 / sigma) ** 2)", "yes"),
        ("def fresh_part", "return smaller * math.sqrt(1 - smaller**2 / sigma**2)", "yes"),
        ("def fresh_part", "return smaller - smaller**2 / sigma", "their squares do"),
        ("def fresh_part", "return smaller**2 - smaller**4 / sigma**2", "that is the variance"),
        ("def fresh_part", "return math.sqrt(sigma**2 - smaller**2)", "from σ′ up to σ"),
        ("def fresh_part", "return smaller", "as if no old noise were kept"),
        ("def step_2m", "aim = x0 + (x0 - before) / (2 * r); return aim + shrink * (x - aim)", "yes"),
        ("def step_2m", "return x0 + shrink * (x - x0)", "that is DDIM's"),
        ("def step_2m", "aim = x0 + (x0 - before) / 2; return aim + shrink * (x - aim)", "farther ahead now"),
        ("def step_2m", "aim = x0 + (x0 - before) * r / 2; return aim + shrink * (x - aim)", "divide by r"),
        ("def step_2m", "aim = x0 + (x0 - before) / r; return aim + shrink * (x - aim)", "a half is missing"),
        ("def step_2m", "aim = x0 + (x0 - before) / (2 * r); return x0 + shrink * (x - aim)", "D in both places"),
    ],
)
def test_slip_in_a_blank_line_of_samplers_is_named(begins, line, words, capsys):
    blank = next(source for source in lesson("08_samplers") if source.startswith(begins) and "# your line" in source)
    assert_said(words, blank, line, begun("08_samplers") | {"predict": None}, capsys)


def said_of_blank(name: str, begins: str, answer: str, namespace: dict, capsys: pytest.CaptureFixture[str]) -> str:
    """What the check says when the one blank line of a lesson returns `answer`; its cell is run from `begins` on."""
    (blank,) = [source for source in lesson(name) if "# your line" in source]
    asked = re.sub("raise NotImplementedError  # your line.*", f"return {answer}", blank[blank.index(begins) :])
    capsys.readouterr()
    run([asked], namespace)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("log_density(x, sigma) + s * classifier(x, sigma)", "yes"),
        ("log_density(x, sigma) + classifier(x, sigma)", "that is s = 1"),
        ("s * classifier(x, sigma)", "log p(x) is missing"),
        ("s * (log_density(x, sigma) + classifier(x, sigma))", "s times both"),
        ("log_density(x, sigma) + s * log_density(x, sigma, BIRD)", "in place of log p(bird | x)"),
    ],
)
def test_slip_in_the_blank_line_of_guidance_is_named(answer, words, prepared, capsys):
    namespace, gradients = prepared("09_guidance")
    namespace |= {"guide": lambda u, c, s: u + s * (c - u), "spots": torch.tensor([[-2.0, 2.0], [0.8, -1.4]])}
    with torch.set_grad_enabled(gradients):
        said = said_of_blank("09_guidance", "def ", answer, namespace, capsys)
    assert words in said and said.startswith(("yes", "not yet: ")), said


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("(x - mean) @ V @ V.T + mean", "yes"),
        ("(x - mean) @ V @ V.T", "add the mean row back"),
        ("x @ V @ V.T + mean", "subtract the mean row first"),
        ("x @ V @ V.T", "the mean row is missing"),
        ("(x - mean) @ V", "these are codes: decode"),
    ],
)
def test_slip_in_the_blank_line_of_pca_is_named(answer, words, capsys):
    namespace = {"torch": torch, "check": check, "expect": expect}
    said = said_of_blank("01_latents", "def project", answer, namespace, capsys)
    assert words in said and said.startswith(("yes", "not yet: ")), said


def said_of(capsys: pytest.CaptureFixture[str], *arguments: object, **choices: object) -> list[str]:
    """The lines that `check` prints of one expectation."""
    check(lambda: expect("case", *arguments, **choices))  # type: ignore[arg-type]
    return [re.sub("  +", " ", line.strip()) for line in capsys.readouterr().out.splitlines()]


def test_check_says_yes_or_not_yet(capsys):
    def unanswered() -> None:
        raise NotImplementedError

    def unsupported() -> None:
        raise NotImplementedError("no kernel")

    for question in (lambda: None, lambda: False, unanswered, unsupported, lambda: 1 / 0):
        check(question)
    assert capsys.readouterr().out.splitlines() == [
        "yes",
        "not yet",
        "not yet",
        "not yet: NotImplementedError: no kernel",
        "not yet: ZeroDivisionError: division by zero",
    ]


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (torch.Size([1, 4]), (1, 4)),
        ([1, 4], (1, 4)),
        (((2, 3), torch.tensor(4.0)), [[2, 3], 4.0]),
        (torch.tensor([2.0]), 2.0),
        (2.0, 2),
        (np.float32(0.1), 0.1),
        (np.ones((2, 3)), torch.ones(2, 3)),
        (torch.ones(2, 3, dtype=torch.float16), np.ones((2, 3))),
        (torch.tensor(True), True),
        (torch.tensor([float("inf")]), torch.tensor([float("inf")])),
        ("a", "a"),
    ],
)
def test_right_answers_of_other_types(got, wanted, capsys):
    assert said_of(capsys, got, wanted) == ["yes"]


@pytest.mark.parametrize(
    ("got", "wanted", "lines"),
    [
        (None, 3.0, ["expected 3", "got None", "hint does your function return its answer?"]),
        (6, 3, ["expected 3", "got 6", "hint that is 2 times what is expected"]),
        (3.0000001, 3, ["expected 3", "got 3"]),
        (2.302585, 1.0, ["expected 1", "got 2.30259", "hint a natural logarithm was taken for one to base 10"]),
        (57.29578, 1.0, ["expected 1", "got 57.2958", "hint degrees were taken for radians"]),
        (torch.ones(3), 3, ["expected 3", "got a tensor of shape (3,)", "hint one number is expected"]),
        (torch.ones(3), (1, 1, 1), ["expected (1, 1, 1)", "got a tensor of shape (3,)"]),
        ([1.0], torch.ones(1), ["expected a tensor of shape (1,)", "got [1.0]"]),
        (torch.ones(3, 2), torch.ones(2, 3), ["expected shape (2, 3)", "got shape (3, 2)", "hint the axes are"]),
        (torch.ones(2), torch.ones(2, 3), ["expected shape (2, 3)", "got shape (2,)"]),
        (-torch.arange(4.0), torch.arange(4.0), ["expected 1 at [1], and 3 of 4", "got -1", "hint the sign is"]),
        (torch.tensor([1.0, 2, 4]), torch.tensor([4.0, 2, 1]), ["hint the order is reversed"]),
        (torch.tensor([1.0, float("nan")]), torch.ones(2), ["got nan", "hint NaN comes from"]),
        ((2, 1), (1, 2), ["expected (1, 2)", "got (2, 1)", "hint the items are right, their order isn't"]),
        ([1], (1, 2), ["expected (1, 2) (2 items)", "got [1] (1 items)"]),
        (list(range(99)), [*range(98), 0], ["expected 0 as item 98", "got 98"]),
        (False, True, ["expected True", "got False"]),
    ],
)  # fmt: skip
def test_wrong_answers(got, wanted, lines, capsys):
    said = said_of(capsys, got, wanted)
    assert said[0] == "not yet: case"
    for line in lines:
        assert any(one.startswith(line) for one in said), said


def test_hints_and_limits(capsys):
    hints = {"too many": 4, "never": None, "any other": ...}
    assert said_of(capsys, 4, 3, hints)[-1] == "hint too many"
    assert said_of(capsys, 7, 3, hints)[-1] == "hint any other"
    assert said_of(capsys, None, 3, {"never": None})[-1] == "hint does your function return its answer?"
    assert said_of(capsys, 3, 3, hints) == said_of(capsys, 0.5, at_least=0.5, at_most=1) == ["yes"]
    assert said_of(capsys, 2.0, at_least=0.5, at_most=1)[1:] == ["expected at least 0.5 and at most 1", "got 2"]
    assert said_of(capsys, float("nan"), at_most=1)[1:] == ["expected at most 1", "got nan"]
    assert said_of(capsys, torch.ones(2), at_most=1)[-1] == "got a tensor of shape (2,)"
