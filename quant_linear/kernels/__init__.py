"""Triton kernels. They validate nothing and allocate nothing: ``quant_linear.ops`` does."""
