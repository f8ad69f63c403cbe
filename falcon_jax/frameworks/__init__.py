"""Flax models of either framework, NNX and Linen, behind one interface."""
