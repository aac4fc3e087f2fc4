"""How a batch reaches its service: one method, `send`, many implementations."""
