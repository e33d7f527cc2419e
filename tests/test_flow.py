"""What `flow` promises beyond the measured values: errors, dtypes, and that noising and the target agree."""

import pytest
import torch

from opensoraplan import flow


def test_a_step_along_the_target_removes_the_noise() -> None:
    x0, noise = torch.randn(2, 2, 4, 3, 4, 6)
    sigma = torch.tensor([0.3, 0.9])
    noised = flow.add_noise(x0, noise, sigma)
    clean = flow.euler_step(noised, flow.velocity_target(x0, noise), sigma.view(-1, 1, 1, 1, 1), 0.0)
    torch.testing.assert_close(clean, x0)


def test_masked_loss_counts_valid_cells_only() -> None:
    prediction, target = torch.randn(2, 1, 4, 2, 4, 4)
    mask = torch.zeros(1, 2, 4, 4)
    mask[:, 0] = 1
    expected = flow.velocity_loss(prediction[:, :, :1], target[:, :, :1])
    torch.testing.assert_close(flow.velocity_loss(prediction, target, mask), expected)


def test_no_guidance_is_the_conditional_velocity() -> None:
    uncond, cond = torch.randn(2, 2, 4, 1, 2, 2)
    torch.testing.assert_close(flow.guide(uncond, cond, 1.0, 0.7), cond)


def test_full_rescale_has_the_conditional_deviation() -> None:
    uncond, cond = torch.randn(2, 3, 4, 2, 4, 4)
    guided = flow.guide(uncond, cond, 8.0, 1.0)
    torch.testing.assert_close(guided.std((1, 2, 3, 4)), cond.std((1, 2, 3, 4)))


@pytest.mark.parametrize("steps", [0, -3])
def test_too_few_steps(steps: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {steps}"):
        flow.sampling_sigmas(steps)


def test_linear_quadratic_needs_an_even_number() -> None:
    with pytest.raises(ValueError, match="even number of steps, got 7: use 8"):
        flow.linear_quadratic_sigmas(7)
    sigmas = flow.linear_quadratic_sigmas(8)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_logit_normal_sigmas_are_inside_the_unit_interval() -> None:
    sigmas = flow.sigmas_from_normal(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    assert 0 < sigmas.min() < sigmas.max() < 1
    assert abs(sigmas.mean() - 0.5) < 0.02
