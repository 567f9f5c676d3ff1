"""Folding in networks of full depth."""

import pytest

from tests.models.test_folding import check_parity, network

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        ("resnet10_slim", "v3plus"),
        ("resnet18", "v3plus_smp"),
        ("resnet50s", "v3plus"),
        ("resnet101", "v2"),
        ("xception65", "v3plus"),
        ("efficientnet_lite0", "v3plus"),
    ],
)
def test_folding_preserves_the_logits(backbone, head):
    check_parity(network(backbone, head))
