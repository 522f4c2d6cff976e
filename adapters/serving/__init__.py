"""What the adapters of vLLM and SGLang share; it imports neither.

Both make a layer first and hand its tensors over one by one, whole, by a loader that hangs on each parameter. So both
need the same: to collect a projection, check it, keep this rank's part, and decide by the files what is quantized.
"""
