"""Flax modules over the methods: thin holders of parameters, for NNX and for Linen."""
