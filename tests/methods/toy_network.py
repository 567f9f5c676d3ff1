"""A network with the interface of `segmenter.Segmenter` that compiles in a second."""

import contextlib
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import pytest

from semiseg_jax.methods import discriminator
from semiseg_jax.models import dsbn, layers
from semiseg_jax.models.segmenter import Features, normalize


class ToyNetwork(nn.Module):
    """Stride 4, one convolution and norm for each level, one convolution as the decoder."""

    num_classes: int
    kind: Any = "dsbn"
    mean: tuple = (127.0,) * 3
    momentum: float = 0.9

    def setup(self):
        self.stem = nn.Conv(4, (4, 4), (4, 4), padding="VALID", dtype=None)
        self.deep = nn.Dense(6)
        self.classifier = nn.Dense(self.num_classes)
        self.norm = dsbn.DomainNorm(self.kind, self.momentum, 1e-3)
        self.head_norm = dsbn.DomainNorm(self.kind, self.momentum, 1e-3)

    def __call__(self, images, domain="weak", groups=1, train=False, num_weak=None):
        features = self.encode(images, domain, groups, train, num_weak)
        return self.decode(features, domain, groups, train, num_weak)

    def encode(self, images, domain="weak", groups=1, train=False, num_weak=None):
        layout = dsbn.DomainLayout(domain, train, groups, num_weak)
        low = nn.relu(self.norm(self.stem(normalize(images, self.mean, (50.0,) * 3)), layout))
        return Features(low, nn.relu(self.deep(low)), images.shape[1:3], stride=4)

    def decode(self, features, domain="weak", groups=1, train=False, num_weak=None):
        layout = dsbn.DomainLayout(domain, train, groups, num_weak)
        joined = jnp.concatenate([features.low, features.high], axis=-1)
        logits = self.classifier(self.head_norm(joined, layout))
        return layers.resize(logits, features.size)


@contextlib.contextmanager
def narrow_discriminators():
    """Discriminators with a sixteenth of the channels; test_discriminator has the true ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discriminator, "FEATURES", tuple(f // 16 for f in discriminator.FEATURES))
        yield
