"""Reports: sparsity, FLOPs, sensitivity, tables and HTML."""
