"""The whole road once, on one machine: the stages are the package's own commands, strung together."""
