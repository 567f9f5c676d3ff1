"""Settings of JAX and XLA that a process makes before its backend starts."""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

from semiseg_jax.runtime.errors import UserError, first_line
from semiseg_jax.runtime.logger import logger


def runs_on_cpu() -> bool:
    """Predicts, before JAX starts its backend, whether JAX will compute on the CPU.

    It will if JAX_PLATFORMS is "cpu", or if that is unset and no other runtime is installed. The
    TPU's runtime counts only on a host with a TPU: it may be installed for its compiler alone (see
    `plan`).
    """
    if os.environ.get("JAX_PLATFORMS"):
        return os.environ["JAX_PLATFORMS"] == "cpu"
    # The CUDA and ROCm runtimes register themselves as plugins; JAX finds the TPU's by its name.
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and not (importlib.util.find_spec("libtpu") and _has_tpu())


def _has_tpu() -> bool:
    """Whether the kernel lists a TPU: /dev/accel0, or from v5e on /dev/vfio/0."""
    devices = Path("/dev")
    return any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))


def require_platform() -> None:
    """Starts JAX's backend; refuses a platform that this machine does not have.

    Raises:
        UserError: JAX cannot start the platform, such as that of JAX_PLATFORMS.
    """
    import jax

    try:
        jax.devices()
    except Exception as error:  # For cuda an AssertionError without text.
        wanted = os.environ.get("JAX_PLATFORMS")
        where = f"JAX_PLATFORMS={wanted}" if wanted else "the devices of this machine"
        raise UserError(
            f"JAX cannot start with {where} ({first_line(error)}): set JAX_PLATFORMS to a platform "
            "that this machine has, such as cpu, and end what else uses its devices.",
            code="platform-missing",
        ) from error


def enable_compilation_cache(folder: os.PathLike | str) -> None:
    """Stores compiled programs in a folder, so that a restart does not compile them again.

    A folder that the user has given JAX, in JAX_COMPILATION_CACHE_DIR, stays. If the folder is not
    writable, the cache stays off: JAX would log a warning for each program.
    """
    import jax

    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        os.makedirs(folder, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        logger.info(f"{folder} cannot be written: compiled programs are not kept")
        return
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))


def force_cpu() -> None:
    """Makes JAX compute on the CPU, one step at a time; call it before JAX starts its backend.

    A call of a compiled program then returns when its results are computed. By default JAX
    dispatches ahead, and allocates the next step's buffers while a step still runs: with
    Xception-65 at 4x257x257 on two cores a step took 3.5 to 4.0 s that way, and takes 2.6 to 2.7 s
    without. Dispatching ahead gains nothing on a CPU, which both dispatches and computes. Programs
    over several devices are not affected.

    JAX does not try any other platform: the TPU's runtime, where it is installed for its compiler
    (see `plan`), prints a page about missing chips.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
