"""The workstation program: an artifact shelf, the run records, and the grids and figures drawn from them."""
