"""How the commands that train begin: what has to be set before JAX starts, and in this order."""

import contextlib
from collections.abc import Iterator
from typing import Any

from semiseg_jax import command_line, memory


@contextlib.contextmanager
def of_a_run(config: Any) -> Iterator[None]:
    """A process that is ready to run a config, and ends in one sentence where something is wrong.

    Memory, the devices' manner, the folder of compiled programs, and the other processes that the
    command line or the cluster tells of. The config is checked.

    Args:
        config: the whole config.
    """
    on_cpu = memory.cpu_computes()
    if on_cpu:
        memory.keep_freed()
    # Imported here, so that --help and a mistyped flag need not wait for JAX and TensorFlow.
    # The data package first, because it silences TensorFlow's greeting.
    from semiseg_jax.data import places  # isort: skip
    from semiseg_jax import mesh, settings

    with command_line.one_sentence():
        settings.check(config)
        if on_cpu:
            mesh.compute_on_cpu()
        mesh.keep_compiled_programs(places.cache_dir(config.data) / "compiled")
        command_line.start_processes(on_cpu)
        yield
