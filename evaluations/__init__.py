"""FID, sFID, Inception Score, precision and recall in PyTorch, computed as in ADM's evaluator."""
