"""All that knows Megatron-Core: the parts that we bring to it, the model, process groups, kernels."""
