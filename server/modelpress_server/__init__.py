"""The gRPC service `compress-server`: uploads, models, jobs, and the scheduling of worker processes.

The gRPC process never imports torch, onnx, onnxruntime or numpy: bytes from a user are parsed in a worker child only.
"""
