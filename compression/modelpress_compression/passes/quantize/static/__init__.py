"""Static quantization: what is in 8 bits, made ready once, and written for any choice of layers."""
