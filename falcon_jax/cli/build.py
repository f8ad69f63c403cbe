"""The sub-command `build`: the native kernels, compiled for this machine."""

from typing import Any

from falcon_jax.native import build


def add_build(commands: Any) -> None:
    """Add `build`: compile the kernels that `falcon_jax.deploy` uses on CPUs.

    Args:
        commands: the sub-commands of the parser, as `add_subparsers` gives them.
    """
    text = "compile the kernels that make deployed models faster on this CPU"
    parser = commands.add_parser("build", help=text, description=text.capitalize() + ".")
    parser.add_argument("--compiler", help="of C++17 (default: $CXX, g++ or clang++)")
    parser.set_defaults(run=lambda parsed: print(build(compiler=parsed.compiler)))
