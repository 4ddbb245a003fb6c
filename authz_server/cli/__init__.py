"""The command lines: `authz-server` for operators, `authzctl` for the security team."""
