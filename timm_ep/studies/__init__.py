"""What is measured: fidelity of the gradient, cost, speed, and runs beside each other."""
