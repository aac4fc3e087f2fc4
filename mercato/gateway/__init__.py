"""The public HTTP API: a declarative table of routes for each service, and the code that answers requests from it."""
