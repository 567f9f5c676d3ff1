import subprocess
import sys

import pytest

from semiseg_jax import memory

COUNT_FAULTS = """
import ctypes, resource, sys, threading
if sys.argv[1] == "kept":
    from semiseg_jax import memory
    assert memory.keep_freed()

def use_large_blocks():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    size = 2**26  # 16,384 pages, beyond the limit that glibc raises by itself
    for _ in range(10):
        block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
        ctypes.memset(block, 1, size)
        libc.free(block)

use_large_blocks()
thread = threading.Thread(target=use_large_blocks)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(mode):
    command = [sys.executable, "-c", COUNT_FAULTS, mode]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="is about glibc")
def test_large_blocks_are_used_again_without_touching_new_pages():
    given_back, kept = faults("given back"), faults("kept")
    # Of 20 blocks, at most one a thread is new.
    assert given_back > kept + 18 * 16384


@pytest.mark.parametrize(
    ("platforms", "plugins", "libtpu", "chips", "expected"),
    [
        ("", [], None, False, True),
        ("", ["xla_cuda12"], None, False, False),
        ("", [], "libtpu", True, False),
        ("", [], "libtpu", False, True),  # there to compile with
        ("cpu", ["xla_cuda12"], "libtpu", True, True),
        ("tpu,cpu", [], "libtpu", True, False),
    ],
)
def test_where_the_cpu_computes(monkeypatch, platforms, plugins, libtpu, chips, expected):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(memory.importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: libtpu)
    monkeypatch.setattr(memory, "_has_tpu", lambda: chips)
    assert memory.cpu_computes() == expected
