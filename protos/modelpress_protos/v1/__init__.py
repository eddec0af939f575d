"""Generated messages and stubs; written by `protos/generate.py`."""
