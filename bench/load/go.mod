module mercato/bench/load

go 1.21
