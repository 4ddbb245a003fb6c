"""The main job on one machine, out of real parts: Valkey, Envoy, upstream instances, and the server itself."""
