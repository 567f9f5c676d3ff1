"""Page faults with and without the malloc settings; prediction of the platform that computes."""

import subprocess
import sys

import pytest

from semiseg_jax.runtime import xla

COUNT_FAULTS = """
import ctypes, resource, sys, threading
if sys.argv[1] == "without trimming":
    from semiseg_jax.runtime import malloc
    assert malloc.disable_malloc_trim()

def use_large_blocks():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    size, count = map(int, sys.argv[2:])
    for _ in range(count):
        block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
        ctypes.memset(block, 1, size)
        libc.free(block)

use_large_blocks()
thread = threading.Thread(target=use_large_blocks)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def page_faults(mode, size, count):
    """Page faults of two threads that each take and free `count` blocks of `size` bytes in turn."""
    command = [sys.executable, "-c", COUNT_FAULTS, mode, str(size), str(count)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tests glibc")
def test_large_blocks_are_reused_without_page_faults():
    # 16,384 pages, beyond the limit up to which glibc adapts its threshold.
    by_default, without_trimming = (
        page_faults(mode, 2**26, 10) for mode in ("default", "without trimming")
    )
    # Of the 20 blocks, at most one per thread is new.
    assert by_default > without_trimming + 18 * 16384


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tests glibc")
def test_blocks_of_more_than_2_gib_are_reused_too():
    pages = (2**31 + 2**20) // 4096
    assert page_faults("without trimming", 4096 * pages, 2) < 2.5 * pages


@pytest.mark.parametrize(
    ("platforms", "plugins", "libtpu", "chips", "expected"),
    [
        ("", [], None, False, True),
        ("", ["xla_cuda12"], None, False, False),
        ("", [], "libtpu", True, False),
        ("", [], "libtpu", False, True),  # libtpu is installed for its compiler
        ("cpu", ["xla_cuda12"], "libtpu", True, True),
        ("tpu,cpu", [], "libtpu", True, False),
    ],
)
def test_runs_on_cpu(monkeypatch, platforms, plugins, libtpu, chips, expected):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(xla.importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(xla.importlib.util, "find_spec", lambda name: libtpu)
    monkeypatch.setattr(xla, "_has_tpu", lambda: chips)
    assert xla.runs_on_cpu() == expected
