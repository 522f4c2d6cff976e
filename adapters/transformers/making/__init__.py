"""Making GPTQ checkpoints out of transformers' models: blocks, stages and what becomes of the model."""
