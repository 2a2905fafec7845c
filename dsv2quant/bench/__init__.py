"""Timing of kernels and models on a GPU, against peers and the limits of the machine."""
