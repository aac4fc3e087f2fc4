"""Stand-ins for systems that are not ours, each with a store of its own."""
