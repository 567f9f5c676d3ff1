"""Every file of a workdir that a result follows from, one flipped bit at a time."""

import pytest

from tests import test_workdir_integrity as fast
from tests.test_workdir_integrity import config, folder, no_work, run, two_devices, whole  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs")]


def test_a_bit_flipped_in_any_file_is_found(config, whole, run, no_work):  # noqa: F811
    for path in fast.files_of(whole):
        if fast.classify(path) != "people":
            for seed in (1, 2):
                fast.check_flip(path, seed, config, run, whole)
