"""The parts of `benchmark_training.py`: tasks, contenders, runs, results and the report."""
