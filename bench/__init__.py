"""How fast? Benchmarks of the engine, and its peers measured beside it."""
