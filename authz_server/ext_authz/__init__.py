"""Envoy's wire protocol: the only room that knows protobuf and gRPC."""
