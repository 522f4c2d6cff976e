"""The numeric core: the GPTQ format, layouts, kernels and modules. It knows torch and Triton, and no framework."""

if __name__ == "quant_linear":  # a checkout on sys.path must not shadow anybody's own `quant_linear`
    raise ImportError("this folder is the package graftq.quant_linear; import it by that name")
