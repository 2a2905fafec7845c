"""The runtime: a forward pass in torch, for plain and quantized checkpoints, resident or a layer at a
time. It is the reference that artifacts are measured with; on a Hopper GPU its layers run on the kernels instead."""
