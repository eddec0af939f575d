"""Server reflection in both versions: v1alpha, which grpcio-reflection has, and v1, which newer clients ask for first.

The two differ in the name of their package alone, so that the servicer of the one answers for the other.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

SERVICE_V1 = "grpc.reflection.v1.ServerReflection"


def enable_reflection(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Has a server describe its services, and reflection itself."""
    _describe_v1()
    names = (*services, reflection.SERVICE_NAME, SERVICE_V1)
    servicer = reflection.aio.ReflectionServicer(names)  # type: ignore[attr-defined]  # the stubs know the synchronous one
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE_V1, {"ServerReflectionInfo": handler}),)
    )


def _describe_v1() -> None:
    """Has the descriptors of v1 in the pool, made from those of v1alpha; once a process, or never if they are there."""
    pool = descriptor_pool.Default()
    try:
        pool.FindServiceByName(SERVICE_V1)
    except KeyError:
        alpha = descriptor_pb2.FileDescriptorProto.FromString(reflection_pb2.DESCRIPTOR.serialized_pb)
        text = text_format.MessageToString(alpha).replace("v1alpha", "v1")
        pool.Add(text_format.Parse(text, descriptor_pb2.FileDescriptorProto()))
