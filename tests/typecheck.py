"""The run-time type checker of the tests: shapes and types at every call of the package."""

from beartype import BeartypeConf, beartype

# An int where a float is expected is fine, as in the type checkers (PEP 484).
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
