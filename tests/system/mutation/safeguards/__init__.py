"""`make safeguards`: each safeguard is taken away in a copy of this tree, and a test has to miss it."""
