"""The start of JAX in a notebook or a program that uses the package; commands use `cli`."""

from semiseg_jax.runtime import malloc, paths, xla


def start_jax(cache_dir: str = "") -> None:
    """Starts JAX with the settings of the commands; call it before anything else uses JAX.

    On a CPU, steps run one at a time and freed memory stays with the process, which is faster
    (see `xla.force_cpu` and `malloc`). Compiled programs are kept on disk for the next process.

    Args:
        cache_dir: folder of the compiled programs, as `data.cache_dir`; "" for $SEMISEG_CACHE, else
            ~/.cache/semiseg_jax.

    Raises:
        UserError: JAX cannot start.
    """
    if xla.runs_on_cpu():
        malloc.disable_malloc_trim()
        xla.force_cpu()
    xla.enable_compilation_cache(paths.default_cache_dir(cache_dir) / "compiled")
    xla.require_platform()
