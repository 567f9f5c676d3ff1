import jax
import numpy as np
import pytest

from semiseg_jax.methods.ramps import ramp
from tests.methods import arrays
from tests.methods.published import fixture


@pytest.mark.parametrize("shape", ["sigmoid", "linear", "cosine", "log", "exp"])
def test_ramps_are_those_of_the_published_code(shape):
    with jax.enable_x64(True):
        factors = [ramp(step, 10, shape=shape) for step in arrays.RAMP_STEPS]
        np.testing.assert_allclose(factors, fixture("cct")["ramps"][shape], rtol=1e-12, atol=1e-15)


def test_a_ramp_is_0_before_its_start_and_1_at_once_without_length():
    assert [float(ramp(step, 4, start=3, shape="linear")) for step in (0, 2, 3, 5, 7, 99)] == [
        *(0, 0, 0, 0.5, 1, 1)
    ]
    assert [float(ramp(step, 0, start=3)) for step in (2, 3, 4)] == [0, 1, 1]


def test_a_ramp_compiles_with_the_step_as_an_argument():
    np.testing.assert_allclose(jax.jit(lambda t: ramp(t, 10))(5), np.exp(-1.25), rtol=1e-6)
