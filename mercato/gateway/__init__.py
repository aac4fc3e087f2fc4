"""The public HTTP API: a declarative table of routes for each service, and what turns a row into an answer."""
