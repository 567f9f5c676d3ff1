"""The steps of methods with a discriminator on several devices; as in test_method_steps.py."""

import pytest

from tests.methods import test_method_steps as steps
from tests.methods.test_adversarial_steps import ADVERSARIAL
from tests.methods.toy_network import narrow_discriminators

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def small_discriminators():
    with narrow_discriminators():
        yield


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_eight_devices_train_both_networks_as_one_does(name):
    steps.test_the_result_does_not_depend_on_the_number_of_devices(name)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_neither_update_has_a_collective_but_all_reduce(name):
    steps.test_the_step_has_no_collective_but_all_reduce(name)
