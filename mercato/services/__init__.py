"""The services. Each owns its database and depends on the others only by their contracts."""
