"""grpc.reflection.v1alpha: lets grpcurl and its like list, describe and call the services without .proto files."""

from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.struct_pb2 import DESCRIPTOR as STRUCT
from grpc_health.v1.health_pb2 import DESCRIPTOR as HEALTH
from grpc_reflection.v1alpha.reflection_pb2 import DESCRIPTOR as REFLECTION

from authz_server.ext_authz._generated.ext_authz_pb2 import DESCRIPTOR as EXT_AUTHZ

AUTHORIZATION_PACKAGE = "envoy.service.auth.v3"
AUTHORIZATION_SERVICE = "Authorization"


def build_pool() -> DescriptorPool:
    """Return the descriptors of every service that this server has.

    Envoy's service is declared here, under Envoy's name and with our messages. A pool of its own keeps that name out
    of the process-wide one, where a program that embeds this server may have loaded Envoy's own files.
    """
    service = FileDescriptorProto(
        name="authz_server/ext_authz/authorization.proto",
        package=AUTHORIZATION_PACKAGE,
        dependency=[EXT_AUTHZ.name],
        syntax="proto3",
    )
    service.service.add(name=AUTHORIZATION_SERVICE).method.add(
        name="Check", input_type=f".{EXT_AUTHZ.package}.CheckRequest", output_type=f".{EXT_AUTHZ.package}.CheckResponse"
    )
    pool = DescriptorPool()
    for descriptor in (STRUCT, EXT_AUTHZ, HEALTH, REFLECTION):
        pool.AddSerializedFile(descriptor.serialized_pb)
    pool.AddSerializedFile(service.SerializeToString())
    return pool
