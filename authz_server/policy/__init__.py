"""The decision. Pure: no I/O, no protobuf, no clock, no logging, no Redis."""
