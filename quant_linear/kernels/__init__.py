"""Triton kernels. They validate nothing and allocate nothing: the code that launches them does."""
