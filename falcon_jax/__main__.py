"""Runs the command line: python -m falcon_jax."""

import sys

from falcon_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
