"""Finished corpora changed: patients taken out, volumes put in, corpora put together."""
