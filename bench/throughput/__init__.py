"""`make bench`: the throughput of Mercato and of a reference in Go, measured in turns, with every answer checked."""
