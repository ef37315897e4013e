"""Switches for frameworks that compute Kimi Delta Attention, one module each. Nothing is imported here."""
