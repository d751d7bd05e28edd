"""FID, sFID, Inception Score, precision and recall, as ADM's evaluator computes them, in PyTorch."""
