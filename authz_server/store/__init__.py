"""Policy at rest: what is kept in Redis, how it is changed, and how servers follow the changes."""
