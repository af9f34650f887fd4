"""Checks of the notebooks' exercises: "yes", or the first case that fails, with what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FACTORS = {  # wrong / right: what usually lies behind it
    -1.0: "the sign is reversed",
    math.log(10): "a natural logarithm was taken for one to base 10",
    1 / math.log(10): "a logarithm to base 10 was taken for a natural one",
    180 / math.pi: "degrees were taken for radians",
    math.pi / 180: "radians were taken for degrees",
}


class NotYet(Exception):
    """An expectation that an answer doesn't meet, in words."""


class _Gap(NamedTuple):
    wanted: str
    got: str
    note: str = ""


def check(question: Callable[[], object]) -> None:
    """Print "yes" if `question` passes, or else "not yet", with the expectation that failed or the answer's error."""
    try:
        passed = question() is not False
    except NotYet as failure:
        print(f"not yet: {failure}")
    except Exception as error:  # the learner's own code may fail in any way
        unanswered = isinstance(error, NotImplementedError) and not str(error)
        print("not yet" if unanswered else f"not yet: {type(error).__name__}: {error}")
    else:
        print("yes" if passed else "not yet")


def expect(
    case: str,
    got: object,
    wanted: object = None,
    hint: str | Mapping[str, object] = "",
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    atol: float = 1e-5,
    rtol: float = 1e-4,
) -> None:
    """Compare an answer with what is wanted. Tensors are compared by shape, then by value; lists and tuples are alike.

    Args:
        case: what was asked of the answer, such as "a picture of 64 × 128".
        hint: advice; or several, each with the wrong answer it belongs to, `...` for any other, or None for none.
        at_least, at_most: limits of a number, in place of `wanted`.
        atol, rtol: absolute and relative tolerance of numbers; whole numbers must be equal.

    Raises:
        NotYet: they differ; says where, what was wanted, what came, the hint, and the slip if it is a usual one.
    """
    if at_least is None and at_most is None:
        gap = _compare(got, wanted, atol, rtol)
    else:
        gap = _outside(got, -math.inf if at_least is None else at_least, math.inf if at_most is None else at_most)
    if gap is None:
        return
    note = gap.note
    if not isinstance(hint, str):
        slips = ((words, slip) for words, slip in hint.items() if slip is not None)
        found = (one for one in slips if one[1] is ... or not _compare(got, one[1], atol, rtol))
        hint, slip = next(found, ("", ...))
        note = note if slip is ... else ""
    lines = [case, f"expected  {gap.wanted}", f"got       {gap.got}"]
    lines += [f"hint      {words}" for words in (note, hint) if words]
    raise NotYet("\n  ".join(lines))


def _compare(got: object, wanted: object, atol: float, rtol: float) -> _Gap | None:
    """None where both are the same, or else how they differ."""
    if got is None and wanted is not None:
        return _Gap(_show(wanted), "None", "does your function return its answer?")
    if isinstance(wanted, np.ndarray | Tensor) and wanted.ndim:
        return _compare_tensors(got, _tensor(wanted), atol, rtol)
    if isinstance(wanted, list | tuple):
        return _compare_sequences(got, wanted, atol, rtol)
    if isinstance(wanted, int | float | np.floating | np.integer | Tensor) and not isinstance(wanted, bool):
        return _compare_numbers(got, float(wanted), *((0, 0) if isinstance(wanted, int) else (atol, rtol)))
    same = bool(got) == wanted if isinstance(wanted, bool) and _number(got) is not None else got == wanted
    return None if same else _Gap(_show(wanted), _show(got))


def _compare_numbers(got: object, wanted: float, atol: float, rtol: float) -> _Gap | None:
    value = _number(got)
    if value is None:
        return _Gap(_show(wanted), _show(got), "one number is expected")
    if value == wanted or abs(value - wanted) <= atol + rtol * abs(wanted):
        return None
    return _Gap(_show(wanted), _show(value), _slip(torch.tensor([value]).double(), torch.tensor([wanted]).double()))


def _outside(got: object, low: float, high: float) -> _Gap | None:
    value = _number(got)
    if value is not None and low <= value <= high:
        return None
    limits = [f"at least {_show(low)}"] * (low > -math.inf) + [f"at most {_show(high)}"] * (high < math.inf)
    return _Gap(" and ".join(limits), _show(got if value is None else value))


def _compare_tensors(got: object, wanted: Tensor, atol: float, rtol: float) -> _Gap | None:
    right = tuple(wanted.shape)
    if not isinstance(got, np.ndarray | Tensor):
        note = "torch.tensor or torch.stack makes a tensor of it" if isinstance(got, list | tuple) else ""
        return _Gap(f"a tensor of shape {right}", _show(got), note)
    answer = _tensor(got).to(wanted.device)
    if tuple(answer.shape) != right:
        note = "the axes are in another order" if sorted(answer.shape) == sorted(right) else ""
        return _Gap(f"shape {right}", f"shape {tuple(answer.shape)}", note)
    a, b = answer.double(), wanted.double()
    wrong = ~torch.isclose(a, b, rtol, atol, equal_nan=True)
    if not wrong.any():
        return None
    place = tuple(wrong.nonzero()[0].tolist())
    at = f"at {list(place)}, and {int(wrong.sum())} of {wrong.numel()} values differ"
    return _Gap(f"{_show(b[place].item())} {at}", _show(a[place].item()), _slip(a.flatten(), b.flatten()))


def _compare_sequences(got: object, wanted: list[object] | tuple[object, ...], atol: float, rtol: float) -> _Gap | None:
    if not isinstance(got, list | tuple):
        note = "its .shape, or .tolist(), is a sequence" if isinstance(got, Tensor | np.ndarray) else ""
        return _Gap(_show(wanted), _show(got), note)
    if len(got) != len(wanted):
        return _Gap(f"{_show(wanted)} ({len(wanted)} items)", f"{_show(got)} ({len(got)} items)")
    for place, (one, right) in enumerate(zip(got, wanted, strict=True)):
        if gap := _compare(one, right, atol, rtol):
            swapped = sorted(map(repr, got)) == sorted(map(repr, wanted))
            note = "the items are right, their order isn't" if swapped else ""
            if len(_show(wanted)) < 100 and len(_show(got)) < 100:
                return _Gap(_show(wanted), _show(got), note)
            return _Gap(f"{gap.wanted} as item {place}", gap.got, note)
    return None


def _slip(got: Tensor, wanted: Tensor) -> str:
    """What turns the right numbers into those that came, if it is something simple; both are of shape (n,)."""
    if got.isnan().any():
        return "NaN comes from 0/0, ∞ − ∞, or the root or logarithm of a negative number"
    big = wanted.abs() > 1e-3 * wanted.abs().max()
    ratio = (got[big] / wanted[big]).median().item() if big.any() else 0.0
    if len(wanted) > 1 and torch.allclose(got, wanted.flip(0), rtol=1e-3):
        return "the order is reversed"
    if ratio == 0 or not torch.allclose(got, ratio * wanted, rtol=1e-3, atol=1e-6):
        return ""
    known = next((words for factor, words in FACTORS.items() if math.isclose(ratio, factor, rel_tol=1e-3)), "")
    whole = max(abs(ratio), 1 / abs(ratio))
    plain = whole < 101 and math.isclose(whole, round(whole), rel_tol=1e-3)
    return known or (f"that is {ratio:.4g} times what is expected" if plain or len(wanted) > 1 else "")


def _number(value: object) -> float | None:
    """A number, or the one element of a tensor, as a float; None for anything else."""
    if isinstance(value, Tensor | np.ndarray):
        return float(value.item()) if _tensor(value).numel() == 1 else None
    return float(value) if isinstance(value, int | float | np.floating | np.integer) else None


def _tensor(value: Tensor | np.ndarray) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.tensor(value)


def _show(value: object) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.6g}"
    text = f"({', '.join(map(_show, value))})" if isinstance(value, tuple) else repr(value)
    return text if len(text) < 160 else f"{text[:150]} …"
