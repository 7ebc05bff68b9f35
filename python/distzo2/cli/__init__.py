"""The command `distzo2`."""
