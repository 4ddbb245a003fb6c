"""Envoy's own messages, from the independent full implementation that ours are held against.

Its import warns of Pydantic's deprecations, which are not ours to mend.
"""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from envoy_data_plane.envoy.config.core import v3 as core
    from envoy_data_plane.envoy.service.auth import v3 as auth
    from envoy_data_plane.envoy.type import v3 as envoy_type
    from envoy_data_plane.google import protobuf

__all__ = ["auth", "core", "envoy_type", "protobuf"]
