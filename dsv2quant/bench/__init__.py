"""Timing of kernels and of whole models on a GPU, each beside its peers and the limits of the machine. What is timed
is checked against float64 first; nothing here is needed to convert or to serve."""
