"""Equilibrium Propagation: energy, dynamics and gradient. Knows torch and nothing else of the package."""
