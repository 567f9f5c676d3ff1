"""The backend of Matplotlib after the package has imported it."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import semiseg_jax.runtime.plain_matplotlib
import matplotlib
print(matplotlib.get_backend(auto_select=False))
"""


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("svg", "svg"),
        # As a notebook sets it: "module://" and a module that has it.
        ("module://matplotlib.backends.backend_pdf", "module://matplotlib.backends.backend_pdf"),
        ("module://not_installed.backend", "None"),
        ("not a backend", "None"),
    ],
)
def test_pictures_of_a_notebook_keep_their_backend(backend, expected):
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=os.environ | {"MPLBACKEND": backend},
    )
    assert process.stdout.strip() == expected, process.stderr
