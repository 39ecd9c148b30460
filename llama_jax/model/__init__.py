"""The model: forward pass, sharding, parameters, quantization."""
