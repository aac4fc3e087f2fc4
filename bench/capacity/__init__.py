"""From what an order costs to the machines for many: a simulation that reproduces the measured figures, and a plan."""
