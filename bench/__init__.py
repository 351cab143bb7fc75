"""How fast the operators are: `python -m bench.bench_<op>`, one file an op."""
