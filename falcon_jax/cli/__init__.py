"""The command line: python -m falcon_jax SUBCOMMAND."""
