"""Train, compress and fine-tune a network as a config file says.

python train.py --config=configs/demo.py --workdir=runs/demo [--config.some.field=value ...]
"""

import itertools
import pathlib
import re
import sys
import traceback
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import config_flags

from falcon_jax.paths import user_path
from falcon_jax.report.experiment import Report
from falcon_jax.terminal import show, show_error
from falcon_jax.training.config import ExperimentConfig, check_config, check_override
from falcon_jax.training.devices import MODES, Peers, launched, start_distributed
from falcon_jax.training.experiment import run_experiment
from falcon_jax.training.interruption import (
    BAD_INPUT,
    LOST,
    STOPPED,
    Interruption,
    Stopped,
    joined,
    leave,
    watch,
    watched,
)
from falcon_jax.wording import reason, shown

BAD_NUMBERS = 4


def main(arguments: Sequence[str]) -> int:
    """Run the experiment that the command line describes.

    Args:
        arguments: the program's name and its flags.

    Returns:
        The exit status: 0; told in one line on stderr, 2 after bad input, 3 if the run stopped
        early and can go on, 4 after numbers that went bad.
    """
    try:
        config, workdir, peers = read_flags(arguments)
        if peers.several and not watched():
            return watch(sys.orig_argv)
        start_distributed(peers)
        joined()
        with Interruption() as interruption:
            rows, _ = run_experiment(config, workdir, interruption)
    except Stopped as stopped:
        print(f"train.py: {shown(stopped, 1000)}", file=sys.stderr)
        return STOPPED
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(f"train.py: {LOST} ({reason(error)})", file=sys.stderr)
        return STOPPED
    except FloatingPointError as error:
        return fail(error, BAD_NUMBERS)
    except (ValueError, OSError, ImportError) as error:
        return fail(error, BAD_INPUT)
    if jax.process_index() == 0:
        show(Report(rows=rows))
    return 0


def read_flags(arguments: Sequence[str]) -> tuple[ExperimentConfig, pathlib.Path, Peers]:
    """Read the command line and the config file that it names.

    Args:
        arguments: the program's name and its flags.

    Returns:
        The config, the folder to work in and the other processes.

    Raises:
        ValueError: if something about them is wrong.
    """
    arguments = list(itertools.starmap(_with_home, itertools.pairwise(["", *arguments])))
    values = flags.FlagValues()
    workdir = flags.DEFINE_string(
        "workdir", None, "folder of checkpoints, logs and the report", flag_values=values
    )
    mode = flags.DEFINE_enum(
        "distributed", "auto", MODES, "whether several processes train together", flag_values=values
    )
    coordinator = flags.DEFINE_string(
        "coordinator", "", "host:port of process 0, if JAX cannot find it", flag_values=values
    )
    processes = flags.DEFINE_integer(
        "processes", 0, "how many there are; with --coordinator", flag_values=values
    )
    process = flags.DEFINE_integer(
        "process", -1, "number of this one, from 0; with --coordinator", flag_values=values
    )
    config = config_flags.DEFINE_config_file(
        "config",
        None,
        "config file, e.g. configs/demo.py",
        flag_values=values,
        sys_argv=list(arguments),
    )
    if {"--help", "-h", "-help"} & set(arguments):
        print(__doc__, values.main_module_help(), sep="\n")
        sys.exit(0)
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        joined = f"{argument}={following}" if argument in ("--config", "-config") else argument
        path = re.match(r"--?config=([^:]+)", joined)
        if path and not pathlib.Path(path[1]).is_file():
            raise ValueError(f"there is no config file {path[1]}; configs/ holds those that ship")
        if override := re.match(r"--?(config\.[\w.]+)", argument):
            check_override(override[1])
    try:
        unknown = values(list(arguments))[1:]
    except (flags.Error, TypeError, AttributeError, KeyError, SyntaxError) as error:
        raise ValueError(str(error)) from None
    if unknown:
        raise ValueError(f"unexpected argument {unknown[0]!r}")
    if config.value is None or workdir.value is None:
        raise ValueError("give --config=FILE and --workdir=FOLDER")
    checked = check_config(config.value)
    peers = Peers(
        mode=mode.value,
        coordinator=coordinator.value,
        processes=processes.value,
        process=process.value,
        launched=launched(),
    )
    return checked, user_path(workdir.value), peers


def _with_home(before: str, argument: str) -> str:
    flag, equals, path = (
        argument.rpartition("=") if argument.startswith("-") else ("", "", argument)
    )
    if path.startswith("~") and (flag or before) in ("--config", "-config"):
        return f"{flag}{equals}{user_path(path)}"
    return argument


def fail(error: Exception, status: int) -> int:
    """Tell an error in one line on stderr and return the exit status."""
    show_error("train.py", shown(error, 3000))
    return status


if __name__ == "__main__":
    try:
        status = main(sys.argv)
    except Exception:  # ours; threads must not keep the process alive after it either
        traceback.print_exc()
        status = 1
    leave(status)
