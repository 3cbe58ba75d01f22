"""Data that must stay unseen."""
