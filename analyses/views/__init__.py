"""Results to pictures; knows no model."""
