"""The noise schedule against numbers computed by hand, and its errors."""

import math

import pytest
import torch

from minisd.config import ScheduleConfig
from minisd.schedule import Schedule


@pytest.mark.parametrize(("beta_schedule", "middle"), [("linear", 0.006425), ("scaled_linear", 0.00480937194)])
def test_betas_by_hand(beta_schedule, middle):
    """Of 0.00085 and 0.012, the mean, and the square of the mean of the roots."""
    betas = Schedule(ScheduleConfig(num_train_timesteps=3, beta_schedule=beta_schedule)).betas
    assert betas.tolist() == pytest.approx([0.00085, middle, 0.012], rel=1e-8)


@pytest.mark.parametrize(
    ("prediction_type", "prediction"), [("epsilon", 1), ("v_prediction", -math.sqrt(2)), ("sample", 3)]
)
def test_predictions_by_hand(prediction_type, prediction):
    """x0 = 3, epsilon = 1 and σ = 1, so √ᾱ = √(1−ᾱ) = √½, x = 4√½ and v = √½ (1 − 3)."""
    schedule = Schedule(ScheduleConfig(prediction_type=prediction_type))
    x = torch.tensor([4 * math.sqrt(0.5)], dtype=torch.float64)
    x0, epsilon = schedule.convert(torch.full_like(x, prediction), x, 1.0)
    assert (x0.item(), epsilon.item()) == pytest.approx((3, 1))


def test_unknown_names_raise():
    x, t = torch.ones(1, 4, 2, 2), torch.tensor([500])
    unknown = Schedule(ScheduleConfig(prediction_type="flow"))
    for use in (unknown.target, unknown.to_x0, unknown.to_epsilon):
        with pytest.raises(ValueError, match="unknown prediction_type 'flow'; expected 'epsilon', 'v_prediction' or"):
            use(x, x, t)
    with pytest.raises(ValueError, match="unknown beta_schedule 'cosine'; expected 'linear' or 'scaled_linear'"):
        Schedule(ScheduleConfig(beta_schedule="cosine")).alphas_cumprod  # noqa: B018
