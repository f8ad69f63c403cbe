"""The command line: python -m falcon_jax SUBCOMMAND."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from falcon_jax.cli.build import add_build
from falcon_jax.cli.convert import add_compress, add_convert
from falcon_jax.cli.data import add_make_folder
from falcon_jax.cli.evaluate import add_evaluate, add_profile
from falcon_jax.cli.export import add_export
from falcon_jax.cli.shrink import add_shrink
from falcon_jax.data.tfds import prepare
from falcon_jax.terminal import show_error

BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command.

    Args:
        arguments: what follows the program's name, by default what the shell gave.

    Returns:
        the exit status: 0, or 2 after bad input, told in one line on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="falcon_jax", description="Compress trained convolutional networks."
    )
    commands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    for add in COMMANDS:
        add(commands)
    parsed = parser.parse_args(arguments)
    try:
        parsed.run(parsed)
    except (ValueError, OSError, ImportError) as error:
        show_error(parser.prog, " ".join(str(error).split()))
        return BAD_INPUT
    return 0


def add_prepare(commands: Any) -> None:
    """Add `prepare`: download a TFDS data set and write it as array_record files.

    Args:
        commands: the sub-commands of the parser, as `add_subparsers` gives them.
    """
    text = "download a TFDS data set and write it as array_record files"
    parser = commands.add_parser("prepare", help=text, description=text.capitalize() + ".")
    parser.add_argument("--name", required=True, help="name as TFDS has it, for example cifar10")
    parser.add_argument(
        "--data-dir",
        default="",
        help="directory of all data sets (default: TFDS_DATA_DIR or ~/tensorflow_datasets)",
    )
    parser.set_defaults(run=lambda parsed: print(prepare(parsed.name, parsed.data_dir)))


COMMANDS: tuple[Callable[[Any], None], ...] = (
    add_convert,
    add_compress,
    add_shrink,
    add_evaluate,
    add_profile,
    add_export,
    add_prepare,
    add_make_folder,
    add_build,
)

if __name__ == "__main__":
    sys.exit(main())
