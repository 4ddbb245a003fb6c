"""Written by `make protos` from protos/; not to be edited, and not to be imported outside ext_authz."""
