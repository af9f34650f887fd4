"""The numbers of the evaluation: shares with their intervals, PSNR, SSIM, edges, Fréchet distance, retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

Z95 = 1.959964  # the standard normal's 97.5% quantile


@dataclass(frozen=True)
class Share:
    """How many of the cases were correct."""

    right: int
    of: int

    def to_dict(self) -> dict[str, float | int | None]:
        """The counts, the share and its 95% interval; without cases, the share is None."""
        low, high = wilson(self.right, self.of)
        share = round(self.right / self.of, 4) if self.of else None
        return {"right": self.right, "of": self.of, "share": share, "low": round(low, 4), "high": round(high, 4)}


def wilson(right: int, of: int, z: float = Z95) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion, `right` of `of` cases; (0, 1) without cases.

    Source: Wilson 1927; method 3 of Newcombe 1998, "Two-sided confidence intervals for the single proportion".
    """
    if not 0 <= right <= of:
        raise ValueError(f"{right} right of {of} cases; expected 0 ≤ right ≤ of")
    if of == 0:
        return 0.0, 1.0
    # (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)
    p = right / of
    middle = p + z**2 / (2 * of)
    half = z * sqrt(p * (1 - p) / of + z**2 / (4 * of**2))
    scale = 1 + z**2 / of
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """The difference of two shares of the same cases, after minus before, with its 95% interval: (change, low, high).

    Source: Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", method 10.
    """
    n, a, b = len(before), sum(before), sum(after)
    if n == 0 or n != len(after):
        raise ValueError(f"{n} cases before, {len(after)} after; expected as many, at least 1")
    both = sum(x and y for x, y in zip(before, after, strict=True))
    # φ, the correlation of the pairs: b₀₀ b₁₁ − b₀₁ b₁₀ over √(a (n−a) b (n−b)), with a correction for continuity
    odds = float(both * (n - a - b + both) - (a - both) * (b - both))
    scale = sqrt(a * (n - a) * b * (n - b))
    phi = (max(odds - n / 2, 0) if odds > 0 else odds) / scale if scale else 0.0
    p, q, (low_p, high_p), (low_q, high_q) = a / n, b / n, wilson(a, n), wilson(b, n)

    def joined(x: float, y: float) -> float:
        return sqrt(x**2 - 2 * phi * x * y + y**2)

    change = q - p
    return change, change - joined(q - low_q, high_p - p), change + joined(high_q - q, p - low_p)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images (n, c, h, w) in [0, 1], one number each; infinite for equal images."""
    # PSNR = −10 log₁₀ mean (a − b)²
    return -10 * (a - b).square().mean((1, 2, 3)).log10()


def ssim(a: Tensor, b: Tensor, size: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity of images (n, c, h, w) in [0, 1], one number each in [-1, 1]; 1 for equal images.

    The mean over channels and over all places where the Gaussian window fits.
    Source: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity", equation 13.
    """
    channels = a.shape[1]
    a, b = a.double(), b.double()  # variances are small differences of squares
    offsets = torch.arange(size, dtype=a.dtype, device=a.device) - (size - 1) / 2
    bell = torch.exp(-offsets.square() / (2 * sigma**2))
    window = torch.outer(bell, bell) / bell.sum() ** 2
    kernel = window.expand(channels, 1, size, size)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, groups=channels)

    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = mean(a), mean(b)
    variance_a = mean(a * a) - mean_a**2
    variance_b = mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    # SSIM = (2 μₐμ_b + C₁)(2 σₐ_b + C₂) / ((μₐ² + μ_b² + C₁)(σₐ² + σ_b² + C₂))
    above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    below = (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return (above / below).mean((1, 2, 3))


def edge_energy(images: Tensor) -> Tensor:
    """Mean absolute Laplacian of images (n, c, h, w), one number each: what blur takes away, and grain adds.

    Where it is lower in drawn pictures than in real ones, the drawn ones are blurred.
    """
    # Δx = x(i−1, j) + x(i+1, j) + x(i, j−1) + x(i, j+1) − 4 x(i, j)
    inside = images[..., 1:-1, 1:-1]
    beside = images[..., 1:-1, :-2] + images[..., 1:-1, 2:] + images[..., :-2, 1:-1] + images[..., 2:, 1:-1]
    return (beside - 4 * inside).abs().mean((1, 2, 3))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between the Gaussians that fit two sets of feature vectors, (n, d) and (m, d).

    With the features of an Inception network this is the FID. It is biased upwards for small sets, so compare only
    distances that were taken with equally many vectors.
    Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", equation 6.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # tr √(Σₐ Σ_b) = tr √(√Σₐ Σ_b √Σₐ), and the second product is symmetric
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    # d² = ‖μₐ − μ_b‖² + tr(Σₐ + Σ_b − 2 √(Σₐ Σ_b))
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def retrieval(images: Tensor, texts: Tensor, captions: list[str], group: int = 64) -> Share:
    """Count how often a picture's own caption is the nearest among the captions of its group.

    Args:
        images, texts: unit vectors, (n, d).
        captions: their texts; equal captions count as the same.
        group: the number of captions to choose from. An incomplete last group is left out, unless it is the only one.
    """
    group = min(group, len(captions))
    right = 0
    starts = range(0, len(captions) - group + 1, group)
    for start in starts:
        chosen = (images[start : start + group] @ texts[start : start + group].T).argmax(1).tolist()
        right += sum(captions[start + k] == captions[start + best] for k, best in enumerate(chosen))
    return Share(right, len(starts) * group)
