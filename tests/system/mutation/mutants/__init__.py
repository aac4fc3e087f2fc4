"""`make mutants`: random small changes of the product, each in a copy of this tree; a test has to fail."""
