"""Linear-Gaussian state space models: simulated, filtered, smoothed, learned and controlled."""
