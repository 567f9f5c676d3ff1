"""Rules of all config keys, for numbers of every size, and for batches of every size."""

import math

import pytest
from flax import traverse_util

from configs import default
from semiseg_jax import config_check, stages
from semiseg_jax.runtime import rules
from semiseg_jax.runtime.errors import UserError
from tests.conftest import tiny_config
from tests.errors import raises_code

DECLARED = traverse_util.flatten_dict(default.get_config().to_dict(), sep=".")
NUMBERS = (0, -1, 10**20, 10**5000, -1.0, 1e-320, 1e308, math.nan, math.inf)
# Values of other types, as a config file can set.
OTHERS = ("", "x", "a\0b", None, True, (), ("a\0b",), [1], {}, object())


def test_every_declared_key_has_a_rule():
    assert config_check.RULES.keys() == DECLARED.keys()
    for key, value in DECLARED.items():
        assert value is None or rules.accepts(config_check.RULES[key], value), key


def values(key):
    """Yields values for a key: numbers alone, in tuples as long as its own, and other types."""
    yield from (*NUMBERS, *OTHERS)
    if isinstance(DECLARED[key], tuple):
        for number in NUMBERS:
            for length in {1, len(DECLARED[key]) or 2}:
                yield (number,) * length
                yield ((number,) * 3,) * length


def set_value(key, value):
    """Returns the declared config with any value for a key, of any type."""
    config = tiny_config()
    *sections, name = key.split(".")
    with config.ignore_type(), config.unlocked():
        parent = config
        for section in sections:
            parent = parent[section]
        parent[name] = value
    return config


@pytest.mark.parametrize("key", sorted(DECLARED))
def test_a_value_is_accepted_or_refused_by_name(key):
    for value in values(key):
        try:
            config = set_value(key, value)
        except OverflowError:
            continue  # ml_collections converts integers for keys with floats.
        try:
            config_check.check(config)
        except UserError as error:
            assert len(str(error)) < 600 and "\n" not in str(error)
            # The last: a path to weights is refused by its own name.
            names = (key, key.rpartition(".")[2], value if isinstance(value, str) else key)
            assert any(name in str(error) for name in names), (value, str(error))
        else:
            huge = [n for n in numbers_in(value) if not math.isfinite(n) or abs(n) > 2**63]
            assert not huge, (key, value)
            assert "\0" not in repr(value)


def numbers_in(value):
    if isinstance(value, tuple | list):
        return [n for element in value for n in numbers_in(element)]
    return [value] if isinstance(value, int | float) else []


BATCHES = [(1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (8, 8), (1, 4)]


@pytest.mark.parametrize("norm", ["dsbn", "dsbn_shared_affine", "shared", "frozen"])
@pytest.mark.parametrize("head", ["v3plus", "v3plus_smp", "v2"])
@pytest.mark.parametrize("streams", [("labeled", "pseudo"), ("both", "both"), ("both", "")])
def test_batches_whose_norms_see_one_value_are_refused(norm, head, streams):
    """Every combination of batch and micro-batches, with crops of one and of more features."""
    kinds = {"": (), "both": ("labeled", "pseudo")}
    weak, strong = (kinds.get(stream, (stream,)) for stream in streams)
    for labeled, accumulate in BATCHES:
        for unlabeled in {accumulate, 2 * accumulate}:
            for crop in ((16, 16), (17, 16)):
                config = tiny_config(
                    model__norm=norm,
                    model__head=head,
                    data__crop=crop,
                    data__weak_stream=weak,
                    data__strong_stream=strong,
                    train__batch_labeled=labeled,
                    train__batch_unlabeled=unlabeled,
                    train__accumulate=accumulate,
                )
                sizes = {"labeled": labeled, "pseudo": unlabeled}
                groups = [labeled], [sizes[k] for k in weak], [sizes[k] for k in strong]
                if norm == "shared":
                    groups = groups[0], [*groups[1], *groups[2]]
                per_image = 1 if head != "v2" else 1 if crop == (16, 16) else 2
                fewest = min(sum(g) // accumulate * per_image for g in groups if g)
                if norm == "frozen" or fewest >= 2:
                    config_check.check(config)
                    continue
                with raises_code("batch-norm-sees-one-value", "train.batch_"):
                    config_check.check(config)


def test_the_remedy_for_a_small_batch_is_accepted():
    config = tiny_config(train__batch_labeled=3, train__accumulate=3, train__batch_unlabeled=9)
    with raises_code("batch-norm-sees-one-value", "train.batch_labeled is 3 in 3", "at least 6"):
        stages.check_norm_values(config)
    config.train.batch_labeled = 6
    stages.check_norm_values(config)
