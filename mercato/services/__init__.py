"""The services. Each owns its database and knows the others only by their contracts."""
