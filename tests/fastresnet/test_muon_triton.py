"""Muon's Triton kernels against the published update in double precision: interpreted, and on a GPU."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.fastresnet import muon_program
from tests.fastresnet.muon_program import CASES, FEW, LR, MOMENTUM, SHAPES, gradients_of, random

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
HALF, SMALLEST, SINGLE = 2.0**-11, 2.0**-25, 2.0**-24
"""Largest errors of rounding to fp16, relative and of its smallest numbers, and relative ones of float32."""


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def results(request, tmp_path_factory):
    """Updates by the kernels, which Triton's interpreter runs on a CPU."""
    file = tmp_path_factory.mktemp("muon") / "results.pt"
    environment = {**os.environ, "TRITON_INTERPRET": str(int(request.param == "cpu"))}
    command = [sys.executable, "-m", muon_program.__name__, request.param, file]
    subprocess.run(command, env=environment, check=True)
    return torch.load(file)


def norm(matrix, order="fro"):
    return np.linalg.norm(matrix, order)


def rounding(matrix):
    """Bound the Frobenius norm of the error of rounding `matrix` to fp16."""
    return HALF * norm(matrix) + SMALLEST * matrix.size**0.5


def summation(left, right):
    """Bound the Frobenius norm of the error of `left @ right` in float32."""
    return left.shape[1] * SINGLE * norm(abs(left) @ abs(right))


def orthogonalized_with_bound(matrix):
    """Return Muon's polynomial of `matrix` / (its norm + 1e-7), and a bound of the kernels' error of it.

    The bound is to first order in the errors of rounding, which it adds up. A step p(x) enlarges an error of x, in the
    Frobenius norm, by at most the largest slope of p between 0 and the spectral norm of x: x and its error enter an odd
    polynomial only by divided differences of their singular values.
    """
    a, b, c = COEFFICIENTS
    x = matrix / (norm(matrix) + 1e-7)
    error = rounding(x) + 16 * SINGLE * norm(x)  # the norm is a sum in a tree of fewer levels than 16
    for _ in range(3):
        gram = x @ x.T
        polynomial = b * gram + c * gram @ gram
        spectral = np.linspace(0, norm(x, 2), 1000)
        slope = abs(a + 3 * b * spectral**2 + 5 * c * spectral**4).max()
        gram_error = rounding(gram) + summation(x, x.T)
        polynomial_error = rounding(polynomial) + c * summation(gram, gram)
        polynomial_error += (abs(b) + 2 * c * norm(gram, 2)) * gram_error
        error = slope * error + norm(x, 2) * polynomial_error + summation(polynomial, x)
        x = a * x + polynomial @ x
        error += rounding(x)
    return x, error


def published(weight, gradients):
    """Return weight and momentum after airbench94_muon.py's updates, and bounds of the errors of both."""
    rows = len(weight)
    weight, velocity, bound, magnitude = weight.reshape(rows, -1), 0.0, 0.0, 0.0
    for gradient in gradients:
        gradient = gradient.reshape(rows, -1)
        velocity = MOMENTUM * velocity + gradient
        magnitude = MOMENTUM * magnitude + abs(gradient)
        update, error = orthogonalized_with_bound(gradient + MOMENTUM * velocity)
        scale = rows**0.5 / norm(weight)
        weight = scale * weight - LR * update
        bound = scale * bound + LR * error + 32 * SINGLE * rows**0.5
    return weight, bound, velocity, 4 * SINGLE * magnitude


def assert_published(weight, gradients, updated, velocity):
    """Assert that updates of `weight` by the `gradients` of all steps have given `updated` and `velocity`."""
    weight, *gradients = (tensor.double().numpy() for tensor in (weight, *gradients))
    expected, bound, expected_velocity, velocity_bound = published(weight, gradients)
    assert norm(updated.double().numpy().reshape(expected.shape) - expected) <= bound
    assert (abs(velocity.double().numpy().reshape(expected.shape) - expected_velocity) <= velocity_bound).all()


def few(state):
    """Return the part of `state` that belongs to weights of the shapes `FEW`."""
    return [*state[: len(FEW)], *state[len(SHAPES) :][: len(FEW)]]


def assert_equal(state, other):
    assert all(torch.equal(a, b) for a, b in zip(state, other, strict=True))


@pytest.mark.parametrize(
    ("name", "shapes", "scales"), [*((name, *case) for name, case in CASES.items()), ("large tiles", SHAPES, [1.0])]
)
def test_kernels_compute_the_published_update(results, name, shapes, scales):
    of_steps = [gradients_of(step, scale) for step, scale in enumerate(scales)]
    for i, shape in enumerate(shapes):
        updated, velocity = results[name][i], results[name][len(shapes) + i]
        assert_published(random(shape, i), [gradients[i] for gradients in of_steps], updated, velocity)


def test_update_cancelled_by_found_inf_changes_nothing(results):
    before, after, later = results["cancelled"]
    assert_equal(before, after)
    assert_equal(later, few(results["normal"]))  # nothing is left of the gradients, which were NaN


def test_scaled_gradients_give_the_same_update(results):
    """They are scaled by a power of two, so that nothing is rounded."""
    assert_equal(results["scaled"], few(results["normal"]))


def test_gradients_in_bf16_give_the_same_update(results):
    assert_equal(*results["bf16"])


def test_training_steps_with_kernels_agree_with_those_without(results):
    (before, first, second), (_, reference, _) = results["trained"][True], results["trained"][False]
    assert first.keys() == reference.keys()
    for name in ("0.weight", "3.weight"):
        model, velocity = f"model.{name}", f"optimizer.{name}.momentum_buffer"
        assert torch.equal(first[velocity], reference[velocity])  # the gradients, after the first step
        for state in (first, reference):
            assert_published(before[model], [state[velocity]], state[model], state[velocity])
        for each in (model, velocity):
            assert torch.equal(second[each], first[each])
