"""The admin port: probes, metrics, and a page for people. Plain HTTP, read-only, shows no secret."""
