"""The command line of the programs: flags, one-line errors, and the set-up of a process."""

import contextlib
import io
import logging as python_logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from semiseg_jax.runtime import config_files, malloc, multihost, paths, preemption, xla
from semiseg_jax.runtime.errors import UserError, first_line

# ---------------------------------------------------------------- flags


def define_config_flag(description: str) -> flags.FlagHolder:
    """Defines the flag --config, which brings --config.key for every key of the config.

    Args:
        description: what the command does with the config, for --help.
    """
    try:
        holder = config_flags.DEFINE_config_file(
            "config",
            None,
            f"{description}: the path of a config file, or a shipped config, such as "
            "configs/streets.py; --config.key=value changes a key of it. "
            f"{config_files.default_path()} documents every key.",
            lock_config=True,
        )
    except (flags.Error, ValueError) as error:  # It reads the files that --flagfile names.
        _exit_on_wrong_flag(error)
    # --help lists the flags of the module that was started.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])
    return holder


class _PathParser(flags.ArgumentParser):
    """Parses a path; ~ at its beginning is the home folder."""

    def parse(self, argument: str) -> str:
        if "\0" in argument:
            raise ValueError("a path has no NUL character: correct it")
        try:
            return paths.expand_home(argument)
        except UserError as error:
            raise ValueError(str(error)) from error

    def flag_type(self) -> str:
        return "string"


def define_path_flag(name: str, default: str | None, description: str) -> flags.FlagHolder:
    """Defines a flag whose value is a path of a file or folder, with arguments as DEFINE_string."""
    holder = flags.DEFINE(_PathParser(), name, default, description)
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    return holder


def define_process_flags() -> None:
    """Defines the flags that connect several processes; see `initialize_multihost`."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0, where a run has several processes; else $SEMISEG_COORDINATOR. A "
        "TPU pod and a Slurm step need none of these three.",
    )
    flags.DEFINE_integer(
        "num_processes", None, "How many processes there are; else $SEMISEG_NUM_PROCESSES."
    )
    flags.DEFINE_integer(
        "process_id", None, "Which of them this is, from 0 on; else $SEMISEG_PROCESS_ID."
    )
    for name in ("coordinator", "num_processes", "process_id"):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags of a command without a config; exits with one sentence on a wrong flag.

    Returns:
        The arguments that are not flags; the first is the program.
    """
    try:
        return flags.FLAGS(argv)
    except (flags.Error, ValueError) as error:  # The latter if a --flagfile is no text.
        _exit_on_wrong_flag(error)


def _exit_on_wrong_flag(error: Exception) -> NoReturn:
    """Exits with one sentence on a wrong flag."""
    problem = str(error).removeprefix("ERROR:: ").strip()
    if isinstance(error, ValueError):
        problem = f"A --flagfile cannot be read ({problem})"
    sys.exit(f"Error: {problem}; --help lists the flags.")


def parse_flags_and_config(argv: list[str]) -> list[str]:
    """Parses the flags and loads the config; exits with one sentence on a wrong flag or config.

    Returns:
        The arguments that are not flags; the first is the program.
    """
    files: list[str] = []
    try:
        arguments = flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
        arguments, files = _find_config_files(arguments)
        with config_files.resolve_imports(files[-1]) if files else contextlib.nullcontext():
            positional = flags.FLAGS([argv[0], *_without_replaced_overrides(arguments)])
        config = flags.FLAGS.config
        # ml_collections raises an OSError of the config file at the first access to a key.
        getattr(config, "seed", None)
    except UserError as error:
        sys.exit(f"Error: {error}")
    except Exception as error:  # A config file may raise anything.
        sys.exit(f"Error: {_format_flag_error(error, files[-1] if files else 'given')}")
    if flags.FLAGS["config"].present and not isinstance(config, ConfigDict):
        sys.exit(f"Error: {_format_not_a_config(type(config).__name__)}")
    try:
        paths.expand_home_in_config(config)
    except UserError as error:
        sys.exit(f"Error: {error}")
    return positional


def _find_config_files(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Finds the config files that the arguments name.

    Returns:
        The arguments with the path of the file in each --config, and these paths.

    Raises:
        UserError: a file is missing, which ml_collections would report only at the first access
            to a key.
    """
    with_paths, files = list(arguments), []
    for number, argument in enumerate(arguments):
        if argument == "--":
            break
        flag, equals, value = argument.partition("=")
        position = number if equals else number + 1
        if flag not in ("--config", "-config") or position == len(arguments):
            continue
        path, colon, chosen = (value if equals else arguments[position]).partition(":")
        if not path:
            raise UserError(
                "--config is empty: name a file, such as configs/streets.py.",
                code="config-file-empty",
            )
        path = config_files.find(os.path.expanduser(path))
        config_files.require(path)
        with_paths[position] = f"{flag}=" * bool(equals) + f"{path}{colon}{chosen}"
        files.append(path)
    return with_paths, files


def _without_replaced_overrides(arguments: list[str]) -> list[str]:
    """Returns the arguments without each --config.key that a later one of the same key replaces.

    ml_collections lets the last of two values win, except for tuples, which it joins.
    """
    overrides: dict[str, list[range]] = {}
    for number, argument in enumerate(arguments):
        if argument == "--":
            break
        match = re.fullmatch(r"--?(config\.[^=]+)(=.*)?", argument, re.DOTALL)
        if match is None:
            continue
        follower = arguments[number + 1 : number + 2]
        # A key without a value and without a follower that may be its value is a boolean.
        has_own_value = match[2] is not None or not follower or follower[0].startswith("--")
        positions = range(number, number + (1 if has_own_value else 2))
        overrides.setdefault(match[1], []).append(positions)
    replaced = {n for earlier in overrides.values() for given in earlier[:-1] for n in given}
    return [argument for number, argument in enumerate(arguments) if number not in replaced]


# ---------------------------------------------------------------- errors


def _format_flag_error(error: BaseException, file: str) -> str:
    """Returns the sentence for an error in the flags or in the config file at the path `file`."""
    error = _original_error(error)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if sentence := _format_unknown_key(error, frames[-1].f_globals["__name__"]):
        return sentence
    if any(frame.f_code.co_qualname == "ConfigFileFlagParser.parse" for frame in frames):
        reason = f"The config file {file} raises {type(error).__name__}: {first_line(error)}"
    elif isinstance(error, flags.Error):
        reason = first_line(error)
    # If get_config does not return a config, looking up --config.key fails at its first part.
    elif match := re.search(r"<class '(\w+)'>\.(\w+) .* lookup: \2\b", str(error)):
        return _format_not_a_config(match.group(1))
    else:
        return (
            "A --config.key asks for a part that its value does not have: "
            f"{config_files.default_path()} has every key."
        )
    return f"{reason}; {config_files.default_path()} documents every key, --help the flags."


def _original_error(error: BaseException) -> BaseException:
    """Returns the exception of a config file that ml_collections and absl wrapped in theirs."""
    inner = error.__cause__ or error.__context__
    wrappers = "flag --config=|Error whilst parsing config file|Configuration is not available"
    return _original_error(inner) if inner and re.match(wrappers, str(error)) else error


def _format_unknown_key(error: BaseException, module: str) -> str | None:
    """Returns the sentence for an unknown config key, None for any other error.

    Args:
        error: the original error.
        module: name of the module that raised it.
    """
    # ml_collections writes 'stepz' for an override, and Key "stepz" for a config file.
    pattern = r"\W*(?:Key \"|')(\w+)\\?[\"'](?:.*Did you mean \"(\w+)\")?"
    match = re.match(pattern, str(error), re.DOTALL)
    # A failed lookup in the user's own code has the same type and text.
    is_lookup = isinstance(error, AttributeError | KeyError)
    if not (match and is_lookup and module.startswith("ml_collections")):
        return None
    key, near = match.groups()
    hint = f"did you mean {near}?" if near else f"{config_files.default_path()} has every key."
    return f"There is no config key {key}: {hint}"


def _format_not_a_config(type_name: str) -> str:
    """Returns the sentence for a config file whose get_config returns another type."""
    returned = "nothing" if type_name == "NoneType" else type_name
    return (
        f"get_config of the config file returns {returned}: have it return the config that "
        "configs.default.get_config() gives."
    )


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns UserError and Preempted into an exit with one sentence; ends the other processes too.

    The exit status is preemption.EXIT_STATUS after a preemption.
    """
    try:
        with multihost.fail_together({preemption.Preempted: preemption.EXIT_STATUS}):
            yield
    except UserError as error:
        sys.exit(f"Error: {error}")
    except preemption.Preempted:
        if multihost.is_main():
            print("Interrupted: start the same command again to go on.", file=sys.stderr)
        sys.exit(preemption.EXIT_STATUS)


# ---------------------------------------------------------------- set-up


def start_command(argv: list[str]) -> None:
    """Sets log levels and standard output; exits with one sentence on a positional argument.

    Args:
        argv: the return value of `parse_flags` or `parse_flags_and_config`.
    """
    # Names of files and classes may hold characters that standard output cannot encode. Standard
    # error escapes them by itself.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # The user reads our lines; libraries log warnings and errors only, unless --verbosity is given.
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        python_logging.getLogger("jax").setLevel(python_logging.WARNING)
        _silence_checkpoint_threads()
    if len(argv) > 1:
        sys.exit(f"Error: {argv[1]!r} is not an option: options start with --.")


def _silence_checkpoint_threads() -> None:
    """Turns off what orbax and tensorstore print when a checkpoint cannot be written.

    Their threads print a traceback for each array. The caller receives the same failure, and
    reports it in one sentence.
    """
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
    logging.get_absl_logger().addFilter(_is_no_failure_of_orbax)
    # Other writes may end after the first failure has closed the event loop.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    before = sys.unraisablehook

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = report


def _is_no_failure_of_orbax(record: python_logging.LogRecord) -> bool:
    """Returns False for the errors that orbax logs, True for all other records."""
    in_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
    return not (in_orbax and record.levelno >= python_logging.ERROR)


def start_command_with_config(argv: list[str]) -> str:
    """Starts a command as `start_command` does; exits with one sentence if --config is missing.

    Args:
        argv: the return value of `parse_flags_and_config`.

    Returns:
        The value of --config: the path, and the argument after a colon if there is one.
    """
    start_command(argv)
    if not flags.FLAGS["config"].present:
        sys.exit("Error: --config is missing: give the config to run, such as configs/streets.py.")
    return config_flags.get_config_filename(flags.FLAGS["config"])


@contextlib.contextmanager
def setup_run(config: Any, check: Callable[[Any], None]) -> Iterator[None]:
    """Prepares JAX for a run and turns user errors into one-line exits.

    Sets malloc, the platform and the compilation cache before JAX starts its backend, checks the
    config, and connects the processes that the command line or the cluster names.

    Args:
        config: the whole config.
        check: raises UserError if the config is invalid.
    """
    on_cpu = xla.runs_on_cpu()
    if on_cpu:
        malloc.disable_malloc_trim()
    # Imported here, so that --help and a mistyped flag do not wait for JAX and TensorFlow.
    # TensorFlow first, because other packages would import it with its start-up messages.
    from semiseg_jax.runtime import quiet_tensorflow  # noqa: F401 # isort: skip

    with exit_on_user_error():
        check(config)
        if on_cpu:
            xla.force_cpu()
        xla.enable_compilation_cache(paths.cache_dir(config.data) / "compiled")
        initialize_multihost(on_cpu)
        yield


def initialize_multihost(on_cpu: bool) -> None:
    """Connects this process to the others of the run, and starts JAX's backend.

    Flags take precedence over the SEMISEG_ environment variables; without both the cluster's own
    environment decides, see `multihost.initialize`.

    Args:
        on_cpu: whether the CPU computes.

    Raises:
        UserError: the flags and variables contradict each other, a variable is not a number, or JAX
            cannot start its backend.
    """

    def int_setting(name: str) -> int | None:
        variable = f"SEMISEG_{name.upper()}"
        value = os.environ.get(variable)
        if flags.FLAGS[name].present or not value:
            return flags.FLAGS[name].value
        if not re.fullmatch(r"-?\d+", value):
            raise UserError(
                f"{variable}={value} is not a whole number.",
                code="flag-not-an-integer",
            )
        return int(value)

    coordinator = flags.FLAGS["coordinator"].value or os.environ.get("SEMISEG_COORDINATOR") or None
    multihost.initialize(
        coordinator, int_setting("num_processes"), int_setting("process_id"), on_cpu
    )
    xla.require_platform()
    multihost.connect_devices()
