"""Making GPTQ weights out of float ones: tensors in, codes and scales out. It knows torch, and no framework."""
