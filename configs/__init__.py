"""Experiments, one file each; a package so that config files can share a recipe."""
