"""Triton kernels. They validate nothing and allocate nothing: whoever launches them does."""
