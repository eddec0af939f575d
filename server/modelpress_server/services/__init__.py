"""The gRPC services, one a file."""
