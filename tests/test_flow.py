"""What `flow` promises beyond the measured values: errors, dtypes, and that noising and the target agree."""

import math

import pytest
import torch

from opensoraplan import flow


def test_a_step_along_the_target_removes_the_noise() -> None:
    x0, noise = torch.randn(2, 2, 4, 3, 4, 6)
    sigma = torch.tensor([0.3, 0.9])
    noised = flow.add_noise(x0, noise, sigma)
    clean = flow.euler_step(noised, flow.velocity_target(x0, noise), sigma.view(-1, 1, 1, 1, 1), 0.0)
    torch.testing.assert_close(clean, x0)


def solved(steps: int, *, order: int) -> float:
    """x at sigma 0 of dx/dsigma = x from x = 1 at sigma 1, over shifted sigmas; 1 / e if it were exact."""
    sigmas = flow.sampling_sigmas(steps, 3.0).double()
    x, previous = torch.ones(1, dtype=torch.float64), None
    for index in range(steps):
        velocity, sigma, following = x, sigmas[index], sigmas[index + 1]
        if previous is None or order == 1:
            x = flow.euler_step(x, velocity, sigma, following)
        else:
            before = sigmas[index - 1]
            x = flow.adams_step(x, velocity, sigma, following, previous=previous, previous_sigma=before)
        previous = velocity
    return float(x)


@pytest.mark.parametrize("order", [1, 2])
def test_twice_the_steps_divide_the_error_by_two_to_the_order(order: int) -> None:
    few, many = (abs(solved(steps, order=order) - math.exp(-1)) for steps in (64, 128))
    assert few / many == pytest.approx(2**order, rel=0.1)


def test_adams_is_exact_where_the_velocity_is_linear() -> None:
    sigmas = [0.9, 0.6, 0.1]
    previous, velocity = (torch.tensor([1.0, -2.0]) * sigma + 3 for sigma in sigmas[:2])
    step = flow.adams_step(
        torch.zeros(2), velocity, sigmas[1], sigmas[2], previous=previous, previous_sigma=sigmas[0]
    )
    between = torch.tensor([1.0, -2.0]) * (0.1**2 - 0.6**2) / 2 + 3 * (0.1 - 0.6)
    torch.testing.assert_close(step, between)


def test_no_guidance_is_the_conditional_velocity() -> None:
    uncond, cond = torch.randn(2, 2, 4, 1, 2, 2)
    torch.testing.assert_close(flow.guide(uncond, cond, 1.0, 0.7), cond)


def test_full_rescale_has_the_conditional_deviation() -> None:
    uncond, cond = torch.randn(2, 3, 4, 2, 4, 4)
    guided = flow.guide(uncond, cond, 8.0, 1.0)
    torch.testing.assert_close(guided.std((1, 2, 3, 4)), cond.std((1, 2, 3, 4)))


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
