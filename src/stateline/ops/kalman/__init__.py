"""kalman: means and covariances of a linear-Gaussian state given all observations so far, and their likelihood."""
