"""Training state: saved whole or absent, resumed bit by bit."""
