"""The vision transformer and the names under which its sizes are known."""
